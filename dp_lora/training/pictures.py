"""Pictures of a dataset as training batches."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dp_lora.data.layout import Dataset
from dp_lora.data.pixels import to_pixels

IN_MEMORY_BYTES = 2**30


class Pictures:
    """Batches of pixels (N, C, H, W) in [-1, 1] by row; a small dataset is decoded once and kept as uint8."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        one = dataset.images(slice(0, 1))
        fits = one.nbytes * len(dataset) <= IN_MEMORY_BYTES
        self._kept = dataset.images(slice(None)) if fits else None

    def __call__(self, rows: NDArray[np.int64]) -> Tensor:
        return to_pixels(self._kept[rows] if self._kept is not None else self._dataset.images(rows.tolist()))


def recoloured(pixels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Pictures (N, C, H, W), about `share` of them with their channels in a random order; the others unchanged."""
    order = torch.rand(pixels.shape[:2], generator=generator).argsort(1)
    kept = torch.rand(len(pixels), generator=generator) >= share
    order[kept] = torch.arange(pixels.shape[1])
    return pixels.gather(1, order[:, :, None, None].expand_as(pixels))
