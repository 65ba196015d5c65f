"""Pictures as PNG bytes and uint8 arrays; light to import, for processes that do nothing else."""

import io

import numpy as np
from PIL import Image, ImageOps

MODES = {1: "L", 3: "RGB"}  # PIL's name for a picture of so many channels
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")  # raster formats that PIL decodes by itself


def encode_png(image: np.ndarray) -> bytes:
    """uint8 (H, W, channels) with 1 or 3 channels -> PNG bytes: no timestamp, no text, equal for equal pixels."""
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def decode_png(png: bytes, size: int, channels: int) -> np.ndarray:
    """PNG bytes -> uint8 (size, size, channels). Raises ValueError when they are anything else."""
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


def as_png(picture: bytes, size: int, channels: int) -> bytes:
    """The bytes of a picture file as PNG of this size and number of channels.

    PNG bytes that are already right come back as they are; every picture is decoded once, so that what comes back can
    be read. Raises ValueError for another size, and for bytes that are no whole picture.
    """
    try:
        with Image.open(io.BytesIO(picture), formats=FORMATS) as image:
            if image.size != (size, size):
                raise ValueError(f"the picture is {image.width} x {image.height}, not {size} x {size}")
            image.load()
            if image.format == "PNG" and image.mode == MODES[channels] and "transparency" not in image.info:
                return picture
            upright = converted(ImageOps.exif_transpose(image), channels)
            return encode_png(np.asarray(upright, np.uint8).reshape(size, size, channels))
    except Image.UnidentifiedImageError:
        raise ValueError(f"not a picture of a known format ({', '.join(FORMATS)})") from None
    except ValueError:
        raise
    # decoders meet broken files with almost any exception
    except Exception as error:
        raise ValueError(f"not a whole picture: {' '.join(str(error).split()) or type(error).__name__}") from None
