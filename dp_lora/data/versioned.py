"""Folders below data/: filled by `prepare`, tracked by DVC, each with a source.json that names its origin."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dp_lora.errors import InputError
from dp_lora.files import exclusive, private_folder, read_json, write_json

SOURCE = "source.json"  # origin; revision or url; counts; size in bytes; sha256


@contextmanager
def unfinished(folder: Path) -> Iterator[Path]:
    """The folder beside `folder` for unfinished work (`data/.NAME.part`, which DVC ignores).

    It survives a block that ends early, for the next call. Raises InputError while another process works there.
    """
    part = folder.with_name(f".{folder.name}.part")
    try:
        with exclusive(folder.with_name(f".{folder.name}.lock")):
            # temporary folders that a killed process left
            for left in folder.parent.glob(f".{folder.name}.*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
            private_folder(part)
            yield part
            shutil.rmtree(part, ignore_errors=True)
    except BlockingIOError:
        raise InputError(f"{folder}: another process prepares it; wait until it has ended") from None
    except OSError as error:
        where = error.filename or folder
        line = f"{error.strerror or type(error).__name__}; mend this, then the same command goes on"
        raise InputError(f"{where}: {line}", f"{folder}: {line}") from None


def write_source(folder: Path, facts: dict[str, Any]) -> None:
    write_json(folder / SOURCE, facts)


def read_source(folder: Path) -> dict[str, Any] | None:
    """source.json of a folder, None where there is none. Raises InputError for one that cannot be read."""
    path = folder / SOURCE
    try:
        facts = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())}; prepare the folder again") from None
    if not isinstance(facts, dict):
        raise InputError(f"{path}: must be a mapping; remove the folder and prepare it again")
    return facts


def gigabytes(size: float) -> str:
    """A number of bytes in GB or MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def check_space(folder: Path, needed: int) -> int:
    """Free bytes on the disk that holds, or will hold, `folder`. Raises InputError for fewer than `needed`."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise InputError(f"{folder}: {gigabytes(needed)} needed on this disk, {gigabytes(free)} free; make room")
    return free
