"""Pictures for evaluation: brought to another size or colour where a network asks for it, and compared in shape."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from dp_lora.data.layout import Dataset
from dp_lora.errors import InputError

BATCH_SIZE = 500  # pictures in memory at a time where a whole dataset streams by
UTILITY_SIZE = 64  # pixels: classifiers see larger pictures at this size, which keeps them in memory and affordable


def resized(images: NDArray[np.uint8], size: int, channels: int) -> NDArray[np.uint8]:
    """uint8 (n, H, W, C) -> uint8 (n, size, size, channels): antialiased bilinear; grey is the mean of the colours."""
    if images.shape[1:] == (size, size, channels):
        return images
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    if pixels.shape[1] != channels:
        pixels = pixels.mean(dim=1, keepdim=True).expand(-1, channels, -1, -1)
    if pixels.shape[2:] != (size, size):
        pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def batches(dataset: Dataset) -> Iterator[NDArray[np.uint8]]:
    """All pictures in order, uint8 (up to 500, H, W, C) at a time."""
    for start in range(0, len(dataset), BATCH_SIZE):
        yield dataset.images(slice(start, start + BATCH_SIZE))


def utility_size(dataset: Dataset) -> int:
    return min(dataset.size, UTILITY_SIZE)


def utility_pictures(dataset: Dataset) -> NDArray[np.uint8]:
    """All pictures of a dataset for a classifier: uint8 (n, size, size, C), larger ones shrunk to 64."""
    size = utility_size(dataset)
    return np.concatenate([resized(part, size, dataset.channels) for part in batches(dataset)])


def require_same_shape(samples: Dataset, real: Dataset) -> None:
    """InputError where two sets cannot be compared because their pictures differ in size or colour."""
    if (samples.size, samples.channels) != (real.size, real.channels):
        raise InputError(
            f"{samples.folder}: pictures of {samples.size} pixels and {samples.channels} channels, but {real.folder} "
            f"has {real.size} and {real.channels}; sizes must not be mixed: sample from a model of the data's size"
        )
