"""Memory-mapped files of rows that one process fills and a later one may go on with; the record of how far it is."""

from collections.abc import Iterable
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import DTypeLike

from dp_lora.files import naming_full_disk, read_json, reserve, write_json


def mapped_rows(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> np.memmap:
    """A new .npy file of its owner's alone, to be written to, with all of its blocks on the disk.

    Raises OSError that names it where the disk has no room.
    """
    path.touch(0o600)  # an existing file keeps its mode
    path.chmod(0o600)
    with naming_full_disk(path):
        rows = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    reserve(path)
    return rows


def mapped_again(path: Path) -> np.memmap:
    """The file that an earlier process began with `mapped_rows`, to be written to."""
    reserve(path)  # a kill may have come before its blocks were on the disk
    return cast(np.memmap, np.load(path, mmap_mode="r+", allow_pickle=False))


def record_rows(record: Path, rows: int, files: Iterable[np.memmap]) -> None:
    """Write that the first `rows` rows of `files` are filled; their bytes are on the disk before."""
    for file in files:
        file.flush()
    write_json(record, {"rows": rows}, private=True)


def recorded_rows(record: Path) -> int:
    """The number of rows that an earlier process filled; 0 where there is no record."""
    return int(read_json(record)["rows"]) if record.exists() else 0
