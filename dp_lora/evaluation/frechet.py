"""Frechet distance between two sets of features, in float64 from the first sum to the last eigenvalue."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dp_lora.errors import InputError


@dataclass(frozen=True)
class Statistics:
    """Mean (d,) and unbiased covariance (d, d), float64, of n feature rows."""

    n: int
    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]


def statistics(batches: Iterable[NDArray]) -> Statistics:
    """Mean and covariance of feature batches (rows, d), in one pass.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque (1979): no sum of raw squares, which would
    cancel where the mean is large. Raises InputError for fewer than two rows or for values that are not finite.
    """
    n, mean, scatter = 0, np.zeros(0), np.zeros((0, 0))
    for batch in batches:
        rows = np.asarray(batch, dtype=np.float64)
        if len(rows) == 0:
            continue
        if not np.isfinite(rows).all():
            raise InputError("features: NaN or infinite values; the images or the feature network are broken")
        batch_mean = rows.mean(axis=0)
        centred = rows - batch_mean
        batch_scatter = centred.T @ centred
        if n == 0:
            n, mean, scatter = len(rows), batch_mean, batch_scatter
            continue
        total = n + len(rows)
        shift = batch_mean - mean
        scatter = scatter + batch_scatter + np.outer(shift, shift) * (n * len(rows) / total)
        mean = mean + shift * (len(rows) / total)
        n = total
    if n < 2:
        raise InputError(f"features: {n} images give no covariance; at least 2 are needed")
    return Statistics(n, mean, scatter / (n - 1))


def frechet_distance(a: Statistics, b: Statistics, min_images: int = 2) -> float:
    """Squared Frechet distance between two Gaussians: |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    Heusel et al. 2017 (arXiv 1706.08500), section 3. The trace of the root of C_a C_b is the sum of the root
    eigenvalues of the symmetric S C_b S with S = C_a^(1/2): real and defined for singular covariances too, so no
    diagonal is added. Raises InputError for fewer than `min_images` images on a side, for features of different
    widths, and for statistics that are not finite.
    """
    for side in (a, b):
        if side.n < min_images:
            raise InputError(
                "Frechet distance: too few images, its bias would hide the result; "
                f"at least {min_images} are needed on each side (evaluation.min_images)"
            )
        if not (np.isfinite(side.mean).all() and np.isfinite(side.covariance).all()):
            raise InputError("Frechet distance: statistics hold NaN or infinite values; compute them again")
    if a.mean.shape != b.mean.shape:
        raise InputError(
            f"Frechet distance: features of width {a.mean.shape[0]} and {b.mean.shape[0]} cannot be compared; "
            "use one feature network for both sides"
        )
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    product = root @ b.covariance @ root
    eigenvalues = np.linalg.eigvalsh((product + product.T) / 2)
    shift = a.mean - b.mean
    distance = shift @ shift + np.trace(a.covariance) + np.trace(b.covariance)
    distance -= 2 * np.sqrt(eigenvalues.clip(min=0)).sum()
    return float(max(distance, 0.0))  # rounding may leave -1e-12 for equal sides
