"""Pictures of a dataset as training batches."""

import numpy as np
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
