"""Prepared private pictures against the operator's folder (data.path) as it is now: who was taken out must be gone.

A seal says from which folder a dataset was prepared, and which pictures lay there. The pictures are an HMAC under the
secret of this place (runs/.key), and the seal lies in runs/working, in no file that DVC or a run keeps: nobody else can
test by it whether a picture is in the folder.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dp_lora.cli.common import Call, relative
from dp_lora.cli.pipelines import RUNS, WORKING, private_data
from dp_lora.config import Config
from dp_lora.errors import PRIVATE_PICTURE, InputError, private_names
from dp_lora.events import Events
from dp_lora.files import digest_file, private_folder, read_json, write_json
from dp_lora.operator_key import keyed_digest

SEAL = "prepared_from.json"
PRIVATE = "private"  # below runs/working


def caches(config: Config) -> Path:
    """Folder of what is computed from one private dataset and kept: it goes when the dataset goes."""
    return WORKING / PRIVATE / (config.data.folder or config.experiment.name)


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
        raise InputError(
            "data.path: its pictures changed while they were prepared; type the same command again", PRIVATE_PICTURE
        )
    if folder.absolute() == private_data(config):  # nothing reads a dataset that was prepared elsewhere
        place = os.path.relpath(folder.absolute(), RUNS.parent)
        seal = {"origin": _origin(config), "dataset": place, "seal": _seal(RUNS, folder, before)}
        write_json(private_folder(caches(config)) / SEAL, seal, private=True)


def look(config: Config) -> None:
    """Remove private datasets, and all that is kept of them, that are not known to hold what data.path holds now.

    This experiment's; others that were prepared from the same data.path; and both in the trees that `make reproduce`
    keeps. So nothing is trained on or scored by a picture that was taken out, no copy of it stays in another place, and
    DVC has to prepare the dataset anew. Says in a line what it removed. Raises InputError for a folder that cannot be
    read as `prepare` reads it. Sources other than `folder` are not looked at: nobody withdraws from these.
    """
    data = private_data(config)
    own = [path for path in (data, caches(config), *_unfinished(data)) if path.exists()]
    others = _seals_of_others(config)
    if not (own or others) or (pictures := _pictures(config)) is None:
        return
    held = [] if _is_sealed(config, pictures) else own
    held += [path for path in _outdated(others, config, pictures) if path.exists()]
    if held:
        _remove(held)
        shown = ", ".join(map(relative, held))
        Events().terminal(f"{shown}: removed: not known to be of what data.path holds now; made anew")


def _seals_of_others(config: Config) -> list[tuple[Path, dict[str, Any]]]:
    """Seals of other datasets from the same data.path, each with its project's root: this one, or a kept tree."""
    found = []
    for root in (RUNS.parent, *sorted(RUNS.glob("reproduce/*/tree"))):
        for file in sorted((root / RUNS.name / WORKING.name / PRIVATE).rglob(SEAL)):
            seal = read_json(file)
            # a seal of an earlier form is a text, and names no folder: its own command removes it
            if (
                file.parent != caches(config)
                and isinstance(seal, dict)
                and seal["origin"]["path"] == _origin(config)["path"]
            ):
                found.append((root, {**seal, "caches": file.parent}))
    return found


def _outdated(seals: list[tuple[Path, dict[str, Any]]], config: Config, pictures: str) -> Iterator[Path]:
    """Datasets, and what is kept of each, of pictures that data.path does not hold now, which reads as `pictures`."""
    known = {json.dumps(_origin(config)): pictures}  # each fingerprint reads the whole folder
    for root, seal in seals:
        key = json.dumps(seal["origin"])
        known[key] = known.get(key) or _fingerprint(**seal["origin"])
        dataset = root / seal["dataset"]
        if not _holds(root / RUNS.name, dataset, seal, known[key]):
            yield from (dataset, seal["caches"], *_unfinished(dataset))


def require_prepared(call: Call) -> None:
    """`look`, for what reads a private dataset that another command prepared; InputError for one of other settings.

    A stage that DVC started cannot have it prepared anew: it raises InputError where `look` would remove something.
    """
    from dp_lora.data.prepare import check_prepared

    data = private_data(call.config)
    check_prepared(call.config, data)
    if not call.child:
        look(call.config)
    elif (pictures := _pictures(call.config)) is not None and not _is_sealed(call.config, pictures):
        raise InputError(f"{relative(data)}: data.path has changed since it was prepared; type the same command again")


def _origin(config: Config) -> dict[str, Any]:
    """Which folder is read, and how: what `_fingerprint` takes."""
    from dp_lora.data.metadata_table import Stated

    return {"path": str(Path(config.data.path or "").absolute()), **asdict(Stated.of(config))}


def _pictures(config: Config) -> str | None:
    """The fingerprint of the operator's folder now; None where the pictures are not from one."""
    if config.data.source != "folder" or config.data.path is None:
        return None
    return _fingerprint(**_origin(config))


def _fingerprint(path: str, classes: Sequence[str], **stated: Any) -> str:
    from dp_lora.data.fingerprint import fingerprint
    from dp_lora.data.metadata_table import Stated

    with private_names(PRIVATE_PICTURE):
        return fingerprint(Path(path), Stated(tuple(classes), **stated))


def _seal(runs: Path, dataset: Path, pictures: str) -> str:
    # the dataset's own table holds the digest of each picture: an older dataset that was put back is not sealed
    return keyed_digest(runs, [pictures, digest_file(dataset / "metadata.parquet")])


def _holds(runs: Path, dataset: Path, seal: dict[str, Any], pictures: str) -> bool:
    try:
        return seal["seal"] == _seal(runs, dataset, pictures)
    except OSError:
        return False


def _is_sealed(config: Config, pictures: str) -> bool:
    """Whether the dataset is known to be of the pictures that lie in data.path now."""
    try:
        seal = read_json(caches(config) / SEAL)
    except (OSError, ValueError):
        return False
    return isinstance(seal, dict) and _holds(RUNS, private_data(config), seal, pictures)


def _unfinished(folder: Path) -> list[Path]:
    """What a `prepare` that was killed has left beside `folder` (`files.whole_folder`): private pictures too."""
    return sorted(folder.parent.glob(f".{folder.name}.*.tmp"))


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder)
