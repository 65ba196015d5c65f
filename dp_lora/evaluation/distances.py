"""Distances of samples to the real training pictures, each beside the distance that the autoencoder alone causes."""

import numpy as np
from numpy.typing import NDArray

from dp_lora.evaluation.features import FeatureSets
from dp_lora.evaluation.frechet import Statistics, frechet_distance, statistics
from dp_lora.evaluation.inception import inception_distances
from dp_lora.evaluation.measurement import Measurement

SUMMED = 4096  # rows of features in float64 at once


def letter_distances(letters: FeatureSets) -> list[Measurement]:
    """`letter_frechet_distance` and the reconstruction's."""
    real, enough = _statistics(letters.real), letters.sets.min_images
    name = "letter_frechet_distance"
    distance = frechet_distance(_statistics(letters.samples), real, enough)
    floor = frechet_distance(_statistics(letters.reconstructed), real, enough)
    meaning = "Frechet distance on features of a classifier of the public pictures (not FID)"
    return [
        Measurement(name, distance, f"{meaning}, samples to real training pictures", private=True),
        Measurement(
            f"reconstruction_{name}", floor, f"{meaning}, the autoencoder's reconstructions to them", private=True
        ),
    ]


def _statistics(features: NDArray[np.float32]) -> Statistics:
    return statistics(features[start : start + SUMMED] for start in range(0, len(features), SUMMED))


def fid_and_kid(inception: FeatureSets) -> list[Measurement]:
    """`fid`, `kid` and the reconstruction's, by clean-fid."""
    enough = inception.sets.min_images
    found = inception_distances(inception.samples, inception.real, enough)
    floor = inception_distances(inception.reconstructed, inception.real, enough)
    kinds = {"fid": "Frechet", "kid": "kernel"}
    return [
        Measurement(f"{prefix}{name}", values[name], f"clean-fid's {kind} Inception distance, {what}", private=True)
        for name, kind in kinds.items()
        for prefix, values, what in (
            ("", found, "samples to real training pictures"),
            ("reconstruction_", floor, "the autoencoder's reconstructions to them"),
        )
    ]
