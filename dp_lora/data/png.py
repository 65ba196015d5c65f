"""Pictures as PNG bytes and uint8 arrays; light to import, for processes that do nothing else."""

import importlib
import io
import struct
import zlib
from functools import cache

import numpy as np
from PIL import Image, ImageOps

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOUR_TYPES = {1: 0, 3: 2}  # channels -> PNG's number
MODES = {1: "L", 3: "RGB"}  # channels -> PIL's name
# raster formats that PIL decodes by itself
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF")


@cache
def formats() -> tuple[str, ...]:
    """The formats that are read here: FORMATS, and HEIC where the package pillow-heif is installed."""
    try:
        plugin = importlib.import_module("pillow_heif")  # the user may install it: no dependency of the project
    except ImportError:
        return FORMATS
    plugin.register_heif_opener()
    return (*FORMATS, "HEIF")


def encode_png(image: np.ndarray) -> bytes:
    """uint8 (H, W, channels) with 1 or 3 channels -> PNG bytes: no timestamp, no text, equal for equal pixels."""
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def decode_png(png: bytes, size: int, channels: int) -> np.ndarray:
    """PNG bytes -> uint8 (size, size, channels). Raises ValueError for anything else."""
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            if image.size != (size, size) or image.mode != MODES[channels]:
                found = f"{image.width} x {image.height} {image.mode}"
                raise ValueError(f"is {found}, not {size} x {size} {MODES[channels]}")
            return np.asarray(image, np.uint8).reshape(size, size, channels)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def converted(image: Image.Image, channels: int) -> Image.Image:
    """The picture with 1 or 3 channels of 8 bits: transparency becomes white, 16-bit greys are scaled.

    Raises ValueError for more than 16 bits.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("more than 16 bits per pixel; save it with 8 or 16")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB").convert(MODES[channels])


def is_whole_png(png: bytes, size: int, channels: int) -> bool:
    """Whether these are a PNG picture of this size with 8 bits per channel, every checksum right, every pixel there.

    False too for rare valid forms: interlacing, a palette, a transparent colour. Takes a fifth of the time of decoding
    (PNG specification, sections 5.3, 9.2, 10, 11.2).
    """
    header = SIGNATURE + struct.pack(">I4sIIBBBBB", 13, b"IHDR", size, size, 8, COLOUR_TYPES[channels], 0, 0, 0)
    if not png.startswith(header):
        return False
    view, place = memoryview(png), len(SIGNATURE)
    pixels: list[memoryview] = []
    kinds: list[bytes] = []
    while not kinds or kinds[-1] != b"IEND":
        end = place + 8 + int.from_bytes(view[place : place + 4])
        if end + 4 > len(png) or zlib.crc32(view[place + 4 : end]) != int.from_bytes(view[end : end + 4]):
            return False
        kinds.append(png[place + 4 : place + 8])
        if kinds[-1] == b"IDAT":
            pixels.append(view[place + 8 : end])
        place = end + 4
    first = kinds.index(b"IDAT") if pixels else 0
    others = set(kinds) - {b"IHDR", b"IDAT", b"IEND"}
    in_a_row = kinds[first : first + len(pixels)] == [b"IDAT"] * len(pixels)
    # an upper-case first letter: a chunk that every decoder must understand
    if place != len(png) or not pixels or not in_a_row or any(kind == b"tRNS" or kind[0] < 97 for kind in others):
        return False
    line = 1 + size * channels
    unpacker = zlib.decompressobj()
    try:
        raw = unpacker.decompress(b"".join(pixels), size * line + 1)
    except zlib.error:
        return False
    # the first byte of a line names its filter
    return unpacker.eof and not unpacker.unused_data and len(raw) == size * line and max(raw[::line]) <= 4


def as_png(picture: bytes, size: int, channels: int) -> bytes:
    """The bytes of a picture file as PNG of this size and number of channels.

    PNG bytes that are already right come back unchanged. Every picture is unpacked once, to be sure that the result is
    readable. Raises ValueError for another size, and for bytes that are no whole picture.
    """
    if is_whole_png(picture, size, channels):
        return picture
    try:
        with Image.open(io.BytesIO(picture), formats=formats()) as image:
            if image.size != (size, size):
                raise ValueError(f"the picture is {image.width} x {image.height}, not {size} x {size}")
            image.load()
            if image.format == "PNG" and image.mode == MODES[channels] and "transparency" not in image.info:
                return picture
            upright = converted(ImageOps.exif_transpose(image), channels)
            return encode_png(np.asarray(upright, np.uint8).reshape(size, size, channels))
    except Image.UnidentifiedImageError:
        raise ValueError(f"not a picture of a known format ({', '.join(formats())})") from None
    except ValueError:
        raise
    # decoders raise almost any exception for broken files
    except Exception as error:
        raise ValueError(f"not a whole picture: {' '.join(str(error).split()) or type(error).__name__}") from None
