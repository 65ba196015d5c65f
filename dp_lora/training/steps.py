"""Which rows and which randomness belong to a step: functions of the step alone.

So an interrupted run continues exactly like an unbroken one, without any random state in its checkpoint.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from dp_lora.training.seeds import stream_key


def total_steps(epochs: float, n: int, batch_size: int) -> int:
    """Steps of `batch_size` rows that cover n rows `epochs` times, rounded up."""
    return max(1, math.ceil(epochs * n / batch_size - 1e-9))


class EpochOrder:
    """Rows of each step: the epochs' permutations of n rows, one after another, cut into batches of equal size.

    The permutation of an epoch depends on (seed, epoch) alone; every row comes once per epoch.
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self._permutations: dict[int, NDArray[np.int64]] = {}

    def rows(self, step: int) -> NDArray[np.int64]:
        """Rows (batch_size,) of a step."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = range(int(positions[0]) // self.n, int(positions[-1]) // self.n + 1)
        self._permutations = {epoch: self._permutation(epoch) for epoch in epochs}
        return np.concatenate([self._permutations[e] for e in epochs])[positions - epochs[0] * self.n]

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if epoch in self._permutations:
            return self._permutations[epoch]
        return np.random.default_rng([self.seed, epoch]).permutation(self.n)


def step_generator(seed: int, step: int, stream: str) -> torch.Generator:
    """Generator on the CPU for the noise of one step; `stream` keeps equal seeds of different stages apart."""
    return torch.Generator().manual_seed(stream_key(stream, seed, step))


def curve_steps(total: int) -> list[int]:
    """Steps at which a curve of epsilon has a point: ten or fewer of 1 ... total, the last among them."""
    return sorted({max(1, round(total * part / 10)) for part in range(1, 11)})


class Steps:
    """The numbers 0 ... total - 1 as Lightning's loader; a resumed run begins at its state, the next number."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.next = 0

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        while self.next < self.total:
            self.next += 1
            yield self.next - 1

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]
