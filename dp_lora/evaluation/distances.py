"""Distances of samples to the real training pictures, each beside what the autoencoder alone would cost."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dp_lora.data.layout import Dataset
from dp_lora.data.pixels import to_pixels, to_uint8
from dp_lora.errors import InputError
from dp_lora.evaluation.cache import Cache
from dp_lora.evaluation.frechet import frechet_distance
from dp_lora.evaluation.inception import Inception, inception_distances
from dp_lora.evaluation.letter_features import LetterFeatures
from dp_lora.evaluation.pictures import BATCH_SIZE, batches
from dp_lora.evaluation.report import Measurement
from dp_lora.models.autoencoder import decode, encode
from dp_lora.models.folder import Model, module_digest
from dp_lora.progress import progress

CODED_VALUES = 2**22  # pixel values in the autoencoder at once


@dataclass(frozen=True)
class DistanceInputs:
    """Samples, the real training pictures, and the base whose autoencoder made the samples."""

    samples: Dataset
    real: Dataset
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
        n = min(len(self.samples), len(self.real))
        return np.arange(n) * len(self.real) // n

    def reconstructions(self) -> Iterator[NDArray[np.uint8]]:
        """Real pictures through the base's encoder and decoder, uint8 (n, H, W, C) at a time."""
        device = self.base.device
        rows = self.reconstructed_rows
        step = max(1, min(BATCH_SIZE, CODED_VALUES // (self.real.size**2 * self.real.channels)))
        for start in progress(range(0, len(rows), step), desc="reconstructions", leave=False):
            with torch.inference_mode():
                pixels = to_pixels(self.real.images(rows[start : start + step])).to(device)
                yield to_uint8(decode(self.base.vae, encode(self.base.vae, pixels)))

    def real_facts(self) -> dict[str, object]:
        return {"real": self.real.digest()}

    def reconstruction_facts(self) -> dict[str, object]:
        return {**self.real_facts(), "autoencoder": module_digest(self.base.vae), "n": len(self.reconstructed_rows)}


def letter_distances(comparison: DistanceInputs, letters: LetterFeatures) -> list[Measurement]:
    """`letter_frechet_distance` and the reconstruction's."""
    comparison.require_enough()
    cache, features = comparison.cache, {"features": letters.facts}
    real = cache.statistics(
        "letter-statistics-real",
        {**comparison.real_facts(), **features},
        lambda: letters.statistics(batches(comparison.real)),
    )
    reconstructed = cache.statistics(
        "letter-statistics-reconstructed",
        {**comparison.reconstruction_facts(), **features},
        lambda: letters.statistics(comparison.reconstructions()),
    )
    samples = letters.statistics(batches(comparison.samples))
    name = "letter_frechet_distance"
    distance = frechet_distance(samples, real, comparison.min_images)
    floor = frechet_distance(reconstructed, real, comparison.min_images)
    meaning = "Frechet distance on features of a classifier of printed letters (not FID)"
    return [
        Measurement(name, distance, f"{meaning}, samples to real training pictures", private=True),
        Measurement(
            f"reconstruction_{name}", floor, f"{meaning}, the autoencoder's reconstructions to them", private=True
        ),
    ]


def fid_and_kid(comparison: DistanceInputs, inception: Inception, weights_digest: str) -> list[Measurement]:
    """`fid`, `kid` and the reconstruction's, by clean-fid."""
    comparison.require_enough()
    cache, features = comparison.cache, {"features": weights_digest}
    real = cache.array(
        "inception-features-real",
        {**comparison.real_facts(), **features},
        lambda: inception.features(batches(comparison.real), "Inception, real"),
    )
    reconstructed = cache.array(
        "inception-features-reconstructed",
        {**comparison.reconstruction_facts(), **features},
        lambda: inception.features(comparison.reconstructions(), "Inception, reconstructions"),
    )
    samples = inception.features(batches(comparison.samples), "Inception, samples")
    found = inception_distances(samples, real, comparison.min_images)
    floor = inception_distances(reconstructed, real, comparison.min_images)
    kinds = {"fid": "Frechet", "kid": "kernel"}
    return [
        Measurement(f"{prefix}{name}", values[name], f"clean-fid's {kind} Inception distance, {what}", private=True)
        for name, kind in kinds.items()
        for prefix, values, what in (
            ("", found, "samples to real training pictures"),
            ("reconstruction_", floor, "the autoencoder's reconstructions to them"),
        )
    ]
