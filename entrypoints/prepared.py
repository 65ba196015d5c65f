"""Prepared private pictures against the operator's folder (data.path) as it is now: who was taken out must be gone.

A seal says which pictures a dataset was prepared from. It is an HMAC under the secret of this place (runs/.key), and
lies in runs/working, in no file that DVC or a run keeps: nobody else can test by it whether a picture is in the folder.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dp_lora.config import Config
from dp_lora.errors import PRIVATE_PICTURE, InputError, private_names
from dp_lora.events import Events
from dp_lora.files import digest_file, private_folder, read_json, write_json
from dp_lora.operator_key import keyed_digest
from entrypoints.common import Call, relative
from entrypoints.pipelines import RUNS, WORKING, private_data

SEAL = "prepared_from.json"


def caches(config: Config) -> Path:
    """Folder of what is computed from one private dataset and kept: it goes when the dataset goes."""
    return WORKING / "private" / (config.data.folder or config.experiment.name)


@contextmanager
def sealing(config: Config, folder: Path) -> Iterator[None]:
    """Around the preparing of private pictures to `folder`: afterwards the dataset is sealed.

    Raises InputError where data.path changed meanwhile: nobody could say then which pictures were read.
    """
    _remove(_unfinished(folder))
    before = _pictures(config)
    yield
    if before is None:
        return
    if _pictures(config) != before:
        raise InputError("data.path: its pictures changed while they were prepared; type the same command again")
    if folder.absolute() == private_data(config):  # nothing reads a dataset that was prepared elsewhere
        write_json(private_folder(caches(config)) / SEAL, _seal(config, before), private=True)


def look(config: Config) -> None:
    """Remove a private dataset, and all that is kept of it, that is not known to hold what data.path holds now.

    So nothing is trained on or scored by a picture that was taken out, and DVC has to prepare the dataset anew. Says in
    a line what it removed. Raises InputError for a folder that cannot be read as `prepare` reads it. Sources other than
    `folder` are not looked at: nobody withdraws from these.
    """
    data = private_data(config)
    held = [path for path in (data, caches(config), *_unfinished(data)) if path.exists()]
    if held and not _is_sealed(config):
        _remove(held)
        shown = ", ".join(map(relative, held))
        Events().terminal(f"{shown}: removed: not known to be of what data.path holds now; made anew")


def require_prepared(call: Call) -> None:
    """`look`, for what reads a private dataset that another command prepared; InputError for one of other settings.

    A stage that DVC started cannot have it prepared anew: it raises InputError where `look` would remove something.
    """
    from dp_lora.data.prepare import check_prepared

    data = private_data(call.config)
    check_prepared(call.config, data)
    if not call.child:
        look(call.config)
    elif not _is_sealed(call.config):
        raise InputError(f"{relative(data)}: data.path has changed since it was prepared; type the same command again")


def _pictures(config: Config) -> str | None:
    """The fingerprint of the operator's folder now; None where the pictures are not from one."""
    data = config.data
    if data.source != "folder" or data.path is None:
        return None
    from dp_lora.data.fingerprint import fingerprint

    with private_names(PRIVATE_PICTURE):
        return fingerprint(Path(data.path), list(data.classes), config.privacy.unit == "person")


def _seal(config: Config, pictures: str) -> str:
    # the dataset's own table holds the digest of each picture: an older dataset that was put back is not sealed
    return keyed_digest(RUNS, [pictures, digest_file(private_data(config) / "metadata.parquet")])


def _is_sealed(config: Config) -> bool:
    """Whether the dataset is known to be of the pictures that lie in data.path now; always where none lie there."""
    pictures = _pictures(config)
    try:
        return pictures is None or read_json(caches(config) / SEAL) == _seal(config, pictures)
    except (OSError, ValueError):
        return False


def _unfinished(folder: Path) -> list[Path]:
    """What a `prepare` that was killed has left beside `folder` (`files.whole_folder`): private pictures too."""
    return sorted(folder.parent.glob(f".{folder.name}.*.tmp"))


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder)
