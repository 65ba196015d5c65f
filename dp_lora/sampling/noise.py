"""Noise that belongs to an image, not to a batch: one stream for each (seed, class, index)."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def image_stream(seed: int, class_name: str, index: int) -> np.random.Generator:
    """The random stream of one image.

    Keyed by the class's name, so that it stays the same when other classes are added. Philox takes the whole
    128-bit key; torch's CPU generator would keep 32 bits of it, and two images in ten thousand would collide.
    """
    digest = hashlib.sha256(f"{seed}\0{index}\0{class_name}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def next_noise(streams: Sequence[np.random.Generator], shape: Sequence[int], device: torch.device) -> Tensor:
    """The next N(0, 1) draw (rows, *shape) float32, one row per stream; drawn on the CPU, so equal on every device."""
    rows = np.stack([stream.standard_normal(tuple(shape), dtype=np.float32) for stream in streams])
    return torch.from_numpy(rows).to(device)
