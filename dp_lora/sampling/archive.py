"""An .npz of images, written part by part: no second copy of all images in memory."""

import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from dp_lora.files import whole_file


def write_archive(
    path: Path, parts: Iterable[NDArray[np.uint8]], shape: tuple[int, int, int, int], labels: NDArray[np.int64]
) -> None:
    """Write arr_0, uint8 images of `shape` (n, H, W, 3), and arr_1, labels (n,).

    The FID tools of guided diffusion and its successors read this layout. Raises ValueError where `parts` do not add
    up to n images. Equal content gives equal bytes: members carry no timestamp.
    """
    with whole_file(Path(path)) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            npy.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})
            written = 0
            for part in parts:
                if part.dtype != np.uint8 or part.shape[1:] != shape[1:]:
                    raise ValueError(f"part of {part.dtype} {part.shape} in an archive of uint8 {shape}")
                member.write(np.ascontiguousarray(part).tobytes())
                written += len(part)
        if written != shape[0]:
            raise ValueError(f"{written} images in an archive of {shape[0]}")
        with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
            npy.write_array(member, labels, allow_pickle=False)
