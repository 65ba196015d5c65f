"""Pixels in two forms: uint8 arrays (n, H, W, channels), and float tensors (n, channels, H, W) in [-1, 1]."""

import numpy as np
import torch

from dp_lora.errors import InputError


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
