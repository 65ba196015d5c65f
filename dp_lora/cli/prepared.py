"""Compare prepared private pictures with the operator's folder (data.path): a withdrawn picture must be gone.

A seal states the folder that a dataset was prepared from and, as an HMAC under the secret of this place (runs/.key),
its pictures. It lies in runs/working, which neither DVC nor a run keeps: nobody else can use it to test whether a
picture is in the folder.
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
from dp_lora.config.paths import DVC_COPIES
from dp_lora.errors import PRIVATE_PICTURE, InputError
from dp_lora.events import Events
from dp_lora.files import digest_file, private_folder, read_json, write_json
from dp_lora.operator_key import keyed_digest

SEAL = "prepared_from.json"
PRIVATE = "private"  # below runs/working
ORIGIN = {"path", "classes", "by_person"}  # keys that every seal has about the folder that was read
CAPTIONS = {"captions", "caption_column"}  # a seal of an earlier version lacks these keys, and stays valid


def caches(config: Config) -> Path:
    """Folder of the caches computed from one private dataset; they are removed together with the dataset."""
    return WORKING / PRIVATE / (config.data.folder or config.experiment.name)


@contextmanager
def sealing(config: Config, folder: Path) -> Iterator[None]:
    """Seal the private dataset that the block prepares in `folder`.

    Raises InputError if data.path changed meanwhile: nobody could say then which pictures were read.
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
        place = os.path.relpath(folder.absolute(), WORKING.parents[1])
        seal = {"origin": _origin(config), "dataset": place, "seal": _seal(RUNS, folder, before)}
        write_json(private_folder(caches(config)) / SEAL, seal, private=True)


def look(config: Config) -> None:
    """Remove private datasets, and their caches, unless a seal shows that they hold the pictures now in data.path.

    Checks this experiment's dataset and others prepared from the same data.path, also in the trees that `make
    reproduce` keeps and in the copies of the project that DVC's queue did not delete. So no command trains or scores on
    a withdrawn picture, no copy of it stays elsewhere, and DVC prepares the dataset anew. One line names the removed
    folders. Raises InputError for a folder that `prepare` would refuse. Checks data.source `folder` alone: nobody
    withdraws a picture from the other sources.
    """
    data = private_data(config)
    own = [path for path in (data, caches(config), *_unfinished(data)) if path.exists()]
    others = _seals_of_others(config)
    if not (own or others) or (pictures := _pictures(config)) is None:
        return
    sealed = _read_seal(caches(config) / SEAL)
    held = [] if _is_sealed(config, pictures) else own
    moved = bool(held and sealed and sealed["origin"]["path"] != _origin(config)["path"])
    held += [path for path in _outdated(others, config, pictures) if path.exists()]
    if held:
        shown = ", ".join(map(relative, held))
        why = "prepared from another data.path" if moved else "data.path may hold other pictures by now"
        _remove(held)
        Events().terminal(f"{shown}: removed: {why}; prepared anew")


def _roots() -> Iterator[tuple[Path, Path]]:
    """Roots of the places that hold prepared datasets, each with the folder whose secret seals them."""
    project = RUNS.parent
    yield project, RUNS
    for tree in sorted(RUNS.glob("reproduce/*/tree")):
        yield tree, tree / RUNS.name
    for depth in ("*", "*/*"):
        for copy in sorted(project.glob(f"{DVC_COPIES}/{depth}/{RUNS.name}")):
            yield copy.parent, RUNS


def _seals_of_others(config: Config) -> list[tuple[Path, Path, dict[str, Any]]]:
    """Seals of other datasets from the same data.path, each with its root and the folder of its secret."""
    found = []
    for root, secret in _roots():
        for file in sorted((root / RUNS.name / WORKING.name / PRIVATE).rglob(SEAL)):
            seal = _read_seal(file)
            # a seal that cannot be read names no folder: the command of its own experiment removes its dataset
            if seal is not None and file.parent != caches(config) and seal["origin"]["path"] == _origin(config)["path"]:
                found.append((root, secret, {**seal, "caches": file.parent}))
    return found


def _outdated(seals: list[tuple[Path, Path, dict[str, Any]]], config: Config, pictures: str) -> Iterator[Path]:
    """Datasets whose pictures are not those in data.path now, and their caches; `pictures` is its fingerprint."""
    known: dict[str, str | None] = {json.dumps(_origin(config)): pictures}  # each fingerprint reads the whole folder
    for root, secret, seal in seals:
        key = json.dumps(seal["origin"])
        if key not in known:
            known[key] = _fingerprint_if_taken(seal["origin"])
        dataset, now = root / seal["dataset"], known[key]
        if now is None or not _holds(secret, dataset, seal, now):
            yield from (dataset, seal["caches"], *_unfinished(dataset))


def _fingerprint_if_taken(origin: dict[str, Any]) -> str | None:
    """None if `prepare` would refuse the folder as it is now: it may have a new class that this experiment lacks."""
    try:
        return _fingerprint(**origin)
    except InputError:
        return None


def require_prepared(call: Call) -> None:
    """Call `look` before the private dataset is read; InputError for a dataset that was prepared with other settings.

    A stage that DVC started cannot prepare the dataset anew: it raises InputError where `look` would remove it.
    """
    from dp_lora.data.prepare import check_prepared

    data = private_data(call.config)
    check_prepared(call.config, data)
    if not call.child:
        look(call.config)
    elif (pictures := _pictures(call.config)) is not None and not _is_sealed(call.config, pictures):
        raise InputError(f"{relative(data)}: data.path has changed since it was prepared; type the same command again")


def _origin(config: Config) -> dict[str, Any]:
    """The folder to read and how to read it: the arguments of `_fingerprint`."""
    from dp_lora.data.metadata_table import Stated

    return {"path": str(Path(config.data.path or "").absolute()), **asdict(Stated.of(config))}


def _pictures(config: Config) -> str | None:
    """The fingerprint of the operator's folder now; None if the pictures come from another source."""
    if config.data.source != "folder" or config.data.path is None:
        return None
    return _fingerprint(**_origin(config))


def _fingerprint(path: str, classes: Sequence[str], **stated: Any) -> str:
    from dp_lora.data.fingerprint import fingerprint
    from dp_lora.data.metadata_table import Stated

    return fingerprint(Path(path), Stated(tuple(classes), **stated))


def _seal(runs: Path, dataset: Path, pictures: str) -> str:
    # metadata.parquet holds the digest of each picture: the seal does not hold for an older dataset that was put back
    return keyed_digest(runs, [pictures, digest_file(dataset / "metadata.parquet")])


def _holds(runs: Path, dataset: Path, seal: dict[str, Any], pictures: str) -> bool:
    try:
        return seal["seal"] == _seal(runs, dataset, pictures)
    except OSError:
        return False


def _is_sealed(config: Config, pictures: str) -> bool:
    """Whether the seal shows that the dataset holds the pictures now in data.path."""
    seal = _read_seal(caches(config) / SEAL)
    return seal is not None and _holds(RUNS, private_data(config), seal, pictures)


def _read_seal(file: Path) -> dict[str, Any] | None:
    """A seal as `sealing` writes it; None for a file that is missing, broken or of an earlier form."""
    try:
        seal = read_json(file)
    except (OSError, ValueError):
        return None
    whole = isinstance(seal, dict) and seal.keys() >= {"origin", "dataset", "seal"}
    if not whole or not isinstance(seal["origin"], dict):
        return None
    return seal if seal["origin"].keys() in (ORIGIN, ORIGIN | CAPTIONS) else None


def _unfinished(folder: Path) -> list[Path]:
    """Temporary folders, with private pictures, that a killed `prepare` left beside `folder` (`files.whole_folder`)."""
    return sorted(folder.parent.glob(f".{folder.name}.*.tmp"))


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder)
