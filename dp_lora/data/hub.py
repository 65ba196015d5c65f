"""A Hugging Face dataset of Parquet files -> the project's dataset layout in a folder below data/."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dp_lora.config import Config
from dp_lora.config.schema import Huggingface
from dp_lora.data.captions import COLUMN
from dp_lora.data.copies import check_copies
from dp_lora.data.extraction import extract, read_record
from dp_lora.data.layout import write_index
from dp_lora.data.parquet import PictureFile, Wanted, open_file
from dp_lora.data.versioned import check_space, gigabytes, read_source, unfinished, write_source
from dp_lora.errors import PRIVATE_PICTURE, InputError, private_names
from dp_lora.events import Events
from dp_lora.files import digest_file, digest_value, publish, read_json, write_json

BLOCK = 4096  # least bytes of a file on disk


def prepare_huggingface(config: Config, folder: Path, events: Events) -> None:
    """Fill `folder` with the dataset that config.huggingface names, and source.json, whole or not at all.

    The train files become split train, the test files split test; identical pictures are named to the operator or
    refused, as data.duplicates says. An existing folder is left as it is; an interrupted download or extraction
    resumes. Raises InputError, one line that names file and row.
    """
    settings, data, wanted, key = config.huggingface, config.data, _wanted(config), settings_of(config)
    with unfinished(folder) as part:
        if _is_there(folder, settings, key):
            check_copies(folder, data.duplicates, events)
            events.message(f"{folder}: exists, {settings.repo} at {settings.revision}")
            return
        paths = _downloaded(settings, folder, events)
        _extract(config, part, folder, paths, wanted, key, events)
    events.message(f"{folder}: {settings.train_rows} pictures for training, {settings.test_rows} for testing")


def settings_of(config: Config) -> str:
    """Digest of the settings that determine the dataset; source.json of a prepared folder keeps it."""
    # leave out None: datasets without captions keep their key
    wanted = {name: value for name, value in vars(_wanted(config)).items() if value is not None}
    return digest_value([_request(config.huggingface), wanted])


def _wanted(config: Config) -> Wanted:
    settings, data = config.huggingface, config.data
    captions = (data.caption_column or COLUMN) if data.captions else None
    columns = (settings.image_column, settings.label_column)
    return Wanted(*columns, tuple(data.classes), data.size, data.channels, captions)


@private_names(PRIVATE_PICTURE)
def _extract(
    config: Config,
    part: Path,
    folder: Path,
    paths: list[tuple[str, str, Path]],
    wanted: Wanted,
    key: str,
    events: Events,
) -> None:
    files = _opened(config.huggingface, paths, wanted)
    digests = {file.name: _checked_digest(file) for file in files}
    need = sum(file.picture_bytes + BLOCK // 2 * file.rows for file in files)
    state = part / "state.json"
    keep = _keep(state, key, files, digests)
    if not keep:
        shutil.rmtree(part / "dataset", ignore_errors=True)
        (part / "rows.jsonl").unlink(missing_ok=True)
    write_json(state, {"key": key, "files": digests})
    done = sum(row.size for row in read_record(part / "rows.jsonl"))
    free = check_space(folder, max(0, need - done))
    events.terminal(
        f"{folder}: {gigabytes(need)} of pictures, and as much in DVC's cache where the file system cannot share "
        f"blocks; {gigabytes(free)} free on this disk"
    )
    extract(files, wanted, part / "dataset" / "images", part / "rows.jsonl", keep, folder.name)
    _finish(config, part, folder, files, digests, key, events)


def _request(settings: Huggingface) -> dict[str, Any]:
    """The settings that determine the pictures."""
    names = ("repo", "revision", "train_files", "test_files", "train_rows", "test_rows")
    return {name: getattr(settings, name) for name in names}


def _is_there(folder: Path, settings: Huggingface, key: str) -> bool:
    recorded = read_source(folder)
    metadata, images = folder / "metadata.parquet", folder / "images"
    if recorded is None or recorded.get("settings") != key or not metadata.is_file() or not images.is_dir():
        return False
    total = (settings.train_rows or 0) + (settings.test_rows or 0)
    return recorded.get("sha256") == digest_file(metadata) and len(os.listdir(images)) == total


def _downloaded(settings: Huggingface, folder: Path, events: Events) -> list[tuple[str, str, Path]]:
    """The files' names, splits and places in the cache of huggingface_hub, which downloads missing ones."""
    from huggingface_hub import constants, try_to_load_from_cache

    assert settings.repo is not None
    assert settings.revision is not None
    assert settings.size is not None
    cache = Path(constants.HF_HUB_CACHE)
    named = [(name, "train") for name in settings.train_files or []]
    named += [(name, "test") for name in settings.test_files or []]
    missing = [
        name
        for name, _ in named
        if not isinstance(
            try_to_load_from_cache(settings.repo, name, revision=settings.revision, repo_type="dataset"), str
        )
    ]
    if missing:
        share = len(missing) / len(named)
        free = check_space(cache, int(settings.size * share))
        events.message(
            f"{settings.repo}: {len(missing)} of {len(named)} files, about {gigabytes(settings.size * share)}, to "
            f"download to {cache} (HF_HUB_CACHE), {gigabytes(free)} free there; then about "
            f"{gigabytes(settings.size)} of pictures to {folder}"
        )
    return [(name, split, _downloaded_file(settings.repo, settings.revision, name)) for name, split in named]


def _downloaded_file(repo: str, revision: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    with hub_errors(f"{repo} at {revision}, {name}", "dataset"):
        return Path(hf_hub_download(repo, name, repo_type="dataset", revision=revision, endpoint=endpoint()))


def endpoint() -> str | None:
    """The mirror in HF_ENDPOINT, read at each call: the Hub's client reads it only once, when it is imported."""
    return os.environ.get("HF_ENDPOINT")


@contextmanager
def hub_errors(where: str, kind: str) -> Iterator[None]:
    """Turn the Hub client's exceptions inside the block into an InputError, one line; `kind`: dataset or model."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise InputError(f"{where}: ask for access on the {kind}'s page, and set HF_TOKEN") from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError):
        raise InputError(f"{where}: no such file there; a private {kind} needs HF_TOKEN") from None
    except errors.LocalEntryNotFoundError:
        raise InputError(
            f"{where}: neither in the cache nor to be reached; check the network, HF_ENDPOINT and HF_HUB_OFFLINE, "
            "then the same command goes on"
        ) from None
    # errors of HTTP, Xet and the disk belong to several libraries
    except Exception as error:
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            raise InputError(f"{where}: the server refuses; set HF_TOKEN to one that may read it") from None
        cause = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"{where}: {cause.rstrip('.')}; the same command goes on") from None


def _opened(settings: Huggingface, paths: list[tuple[str, str, Path]], wanted: Wanted) -> list[PictureFile]:
    """The files with their footers read, the numbers of rows checked."""
    files = [open_file(name, path, split, wanted) for name, split, path in paths]
    for split, expected in (("train", settings.train_rows), ("test", settings.test_rows)):
        ours = [file for file in files if file.split == split]
        found = sum(file.rows for file in ours)
        if found != expected:
            listed = ", ".join(f"{file.name} {file.rows}" for file in ours)
            raise InputError(f"{found} rows in {listed}; huggingface.{split}_rows={expected}: name the right files")
    return files


def _checked_digest(file: PictureFile) -> str:
    digest = digest_file(file.path)
    # the cache names a large file by its SHA-256
    blob = file.path.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", blob.name) and blob.name != digest:
        raise InputError(
            f"{file.name}: not the bytes that the server has (sha256 differs); remove {blob} and call again"
        )
    return digest


def _keep(state: Path, key: str, files: list[PictureFile], digests: dict[str, str]) -> int:
    """Number of rows that an unfinished extraction may keep: all before the first changed file."""
    try:
        known = read_json(state)
        before = known["files"] if known["key"] == key else {}
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    rows = 0
    for file in files:
        if before.get(file.name) != digests[file.name]:
            break
        rows += file.rows
    return rows


def _finish(
    config: Config,
    part: Path,
    folder: Path,
    files: list[PictureFile],
    digests: dict[str, str],
    key: str,
    events: Events,
) -> None:
    settings, dataset = config.huggingface, part / "dataset"
    origin = f"Hugging Face dataset {settings.repo} at {settings.revision}"
    source = {"name": config.data.source, "origin": origin, "licence": settings.licence}
    has = {"label": bool(config.data.classes), "caption": config.data.captions}
    rows = (
        [
            row.file_name,
            *([row.label] if has["label"] else []),
            row.split,
            row.sha256,
            *([row.captions] if has["caption"] else []),
        ]
        for row in read_record(part / "rows.jsonl")
    )
    write_index(dataset, rows, source, config.data.size, config.data.channels, **has)
    check_copies(dataset, config.data.duplicates, events)
    facts = {
        "origin": origin,
        "revision": settings.revision,
        "licence": settings.licence,
        "files": [
            {"name": f.name, "rows": f.rows, "size": f.path.stat().st_size, "sha256": digests[f.name]} for f in files
        ],
        "counts": {"train": settings.train_rows, "test": settings.test_rows},
        "size": sum(row.size for row in read_record(part / "rows.jsonl")),
        "sha256": digest_file(dataset / "metadata.parquet"),
        "settings": key,
    }
    write_source(dataset, facts)
    publish(dataset, folder, private=True)
