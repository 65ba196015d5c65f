"""Pixels in three forms: PNG bytes, uint8 arrays (n, H, W, channels), float tensors (n, channels, H, W) in [-1, 1]."""

import io

import numpy as np
import torch
from PIL import Image

from dp_lora.errors import InputError

MODES = {1: "L", 3: "RGB"}  # PIL's name for a picture of so many channels


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 (n, H, W, channels), 0 to 255 -> float32 (n, channels, H, W), -1 to 1."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()


def to_uint8(pixels: torch.Tensor) -> np.ndarray:
    """float (n, channels, H, W), clamped to [-1, 1] -> uint8 (n, H, W, channels); the inverse of `to_pixels`.

    Raises InputError for NaN, which has no colour.
    """
    if torch.isnan(pixels).any():
        raise InputError("pixels: NaN in a picture; the model that made it has diverged, train it with a lower lr")
    scaled = pixels.detach().float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).cpu().contiguous().numpy()


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
