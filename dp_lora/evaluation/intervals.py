"""95% intervals, by scipy."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, bootstrap

CONFIDENCE = 0.95
RESAMPLES = 1000


def share_interval(count: int, n: int) -> tuple[float, float]:
    """Of a share count / n, by Wilson's score (1927): inside [0, 1] and not empty at 0 or n."""
    found = binomtest(count, n).proportion_ci(CONFIDENCE, method="wilson")
    return float(found.low), float(found.high)


def bootstrap_interval(
    samples: tuple[NDArray[np.float64], NDArray[np.float64]], statistic: Callable[..., NDArray[np.float64]]
) -> tuple[float, float]:
    """Of `statistic(first, second, axis)`, by the percentiles of resamples of both `samples` (n,) and (m,), seeded."""
    found = bootstrap(
        samples,
        statistic,
        n_resamples=RESAMPLES,
        batch=100,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)
