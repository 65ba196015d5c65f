"""A memory-mapped file of rows that one process fills and a later one may go on with."""

from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import DTypeLike

from dp_lora.files import naming_full_disk, reserve


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
