"""The pictures of one evaluation as features of one network; results independent of the samples are kept."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dp_lora.data.layout import Dataset
from dp_lora.data.pixels import to_pixels, to_uint8
from dp_lora.errors import InputError
from dp_lora.evaluation.cache import Cache
from dp_lora.evaluation.pictures import BATCH_SIZE, batches
from dp_lora.models.autoencoder import decode, encode
from dp_lora.models.folder import Model, module_digest
from dp_lora.progress import progress

CODED_VALUES = 2**22  # most pixel values in the autoencoder at once


def evenly_spaced(n: int, of: int) -> NDArray[np.int64]:
    """`n` of the rows 0 to `of` - 1, evenly spread."""
    return np.arange(n) * of // n


@dataclass(frozen=True)
class PictureSets:
    """Samples, real training and test pictures, and the base whose autoencoder made the samples.

    `test` is None where no test pictures were prepared.
    """

    samples: Dataset
    real: Dataset
    test: Dataset | None
    base: Model
    min_images: int
    cache: Cache

    def require_enough(self) -> None:
        for dataset in (self.samples, self.real):
            if len(dataset) < self.min_images:
                raise InputError(
                    f"{dataset.folder}: too few pictures for a distance; at least {self.min_images} are needed "
                    "(evaluation.min_images)"
                )

    @property
    def reconstructed_rows(self) -> NDArray[np.int64]:
        """As many real pictures as there are samples, spread over all: equal numbers carry an equal bias."""
        return evenly_spaced(min(len(self.samples), len(self.real)), len(self.real))

    def reconstructions(self) -> Iterator[NDArray[np.uint8]]:
        """Real pictures through the base's encoder and decoder, uint8 (n, H, W, C) at a time."""
        device = self.base.device
        rows = self.reconstructed_rows
        step = max(1, min(BATCH_SIZE, CODED_VALUES // (self.real.size**2 * self.real.channels)))
        for start in progress(range(0, len(rows), step), desc="reconstructions", leave=False):
            with torch.inference_mode():
                pixels = to_pixels(self.real.images(rows[start : start + step])).to(device)
                yield to_uint8(decode(self.base.vae, encode(self.base.vae, pixels)))


@dataclass(frozen=True)
class FeatureSpace:
    """A network's features: `of` gives them (n, d) float32 of batches of pictures uint8 (rows, H, W, C).

    `name` begins the names of kept files, `shown` is in the meaning of a number, `facts` determine the network.
    """

    name: str
    shown: str
    facts: Any
    of: Callable[[Iterable[NDArray[np.uint8]], str], NDArray[np.float32]]


@dataclass(frozen=True)
class FeatureSets:
    """Features (n, d) float32 of the pictures of one evaluation in one space, computed when they are asked for."""

    space: FeatureSpace
    sets: PictureSets

    @cached_property
    def samples(self) -> NDArray[np.float32]:
        return self.space.of(batches(self.sets.samples), f"{self.space.shown}, samples")

    @cached_property
    def real(self) -> NDArray[np.float32]:
        return self._kept("real", {"real": self.sets.real.digest()}, lambda: batches(self.sets.real))

    @cached_property
    def test(self) -> NDArray[np.float32]:
        test = self.sets.test
        assert test is not None, "no test pictures were prepared"
        return self._kept("test", {"test": test.digest()}, lambda: batches(test))

    @cached_property
    def reconstructed(self) -> NDArray[np.float32]:
        facts = {
            "real": self.sets.real.digest(),
            "autoencoder": module_digest(self.sets.base.vae),
            "n": len(self.sets.reconstructed_rows),
        }
        return self._kept("reconstructed", facts, self.sets.reconstructions)

    def _kept(
        self, which: str, facts: dict[str, Any], pictures: Callable[[], Iterable[NDArray[np.uint8]]]
    ) -> NDArray[np.float32]:
        return self.sets.cache.array(
            f"{self.space.name}-features-{which}",
            {**facts, "features": self.space.facts},
            lambda: self.space.of(pictures(), f"{self.space.shown}, {which}"),
        )
