"""One of the user's picture files: checked by its header, or decoded, cropped and resized."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dp_lora.data.png import converted, formats
from dp_lora.errors import PRIVATE_PICTURE, InputError, private_names, shown

MAX_PIXELS = 2**26  # most pixels of a picture decoded whole; more is taken for a decompression bomb
MAX_REDUCED = 2**28  # most pixels of a baseline JPEG, decoded at a half, a quarter or an eighth of its size
SMALLEST = 4  # a picture whose shorter side is below data.size / SMALLEST would be a blur once enlarged
JPEG = ("JPEG", "MPO")
# end markers: a file without its marker was cut off
ENDS = {"PNG": b"IEND", "JPEG": b"\xff\xd9", "MPO": b"\xff\xd9"}
TAIL = 1024  # last bytes of a file, where the end marker is looked for first
HEIC = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")  # brands that iPhones and others write


@private_names(PRIVATE_PICTURE)
def look_at(path: Path, size: int) -> bool:
    """Whether the picture will be cropped, read off its header.

    Raises InputError that names the file for every fault visible without decoding: no picture, cut off, too large, too
    small, several pages or frames. `read_picture` finds the faults that only decoding shows.
    """
    with _opened(path, size) as image:
        if image.format in ENDS and not _has_end(path, ENDS[image.format]):
            raise ValueError("the file is cut off")
        return image.width != image.height


@private_names(PRIVATE_PICTURE)
def read_picture(path: Path, size: int, channels: int) -> np.ndarray:
    """Decode one file, crop its centre square, resize; uint8 (size, size, channels).

    Turned upright by its EXIF orientation; transparency becomes white; 16-bit greys are scaled to 8 bits. A JPEG of
    more than MAX_PIXELS is decoded at a smaller scale. Raises InputError that names the file.
    """
    with _opened(path, size) as image:
        if image.width * image.height > MAX_PIXELS:
            image.draft(None, (size, size))
        return _square(ImageOps.exif_transpose(image), size, channels)


@contextmanager
def _opened(path: Path, size: int) -> Iterator[Image.Image]:
    """The picture with its header read and checked; errors inside become an InputError that names the file."""
    try:
        if path.stat().st_size == 0:
            raise ValueError("the file is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata: the user sees one line of error, or none
            with _header(path) as image:
                _check(image, size)
                yield image
    except Image.UnidentifiedImageError:
        raise InputError(f"{shown(path)}: {_unknown(path)}") from None
    # decoders raise almost any exception for broken files
    except Exception as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{shown(path)}: not a readable picture: {cause}") from None


def _header(path: Path) -> Image.Image:
    # lift Pillow's own limit, which refuses pictures that `_check` takes; only the header is read here
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        return Image.open(path, formats=formats())
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _check(image: Image.Image, size: int) -> None:
    # a progressive JPEG needs all its coefficients in memory, at any scale
    reduced = image.format in JPEG and not image.info.get("progressive")
    most = MAX_REDUCED if reduced else MAX_PIXELS
    if image.width * image.height > most:
        other = "" if reduced else ", or save it as a baseline JPEG"
        raise ValueError(f"more than {most} pixels; make it smaller{other}")
    if min(image.size) * SMALLEST < size:
        raise ValueError(
            f"too small: its shorter side is below a quarter of data.size={size}; leave it out, or lower that"
        )
    # a camera's MPO holds a preview beside the one picture that it shows
    if getattr(image, "is_animated", False) and image.format != "MPO":
        several = "several pages; save one of them" if image.format == "TIFF" else "an animation; save one frame of it"
        raise ValueError(several)
    if image.mode in ("I", "F"):
        raise ValueError("more than 16 bits per pixel; save it with 8 or 16")


def _has_end(path: Path, end: bytes) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        if end in file.read():
            return True
        file.seek(0)  # phones append films and other data to the picture
        return end in file.read()


def _unknown(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(132)
    if head[4:8] == b"ftyp" and head[8:12] in HEIC:
        return "HEIC is read where the package pillow-heif is installed; install it, or save the picture as JPEG"
    if head[128:] == b"DICM":
        return "DICOM is not read; save the picture as PNG"
    return f"not a picture of a known format ({', '.join(formats())})"


def _square(image: Image.Image, size: int, channels: int) -> np.ndarray:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    image = converted(image, channels).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image, np.uint8).reshape(size, size, channels)
