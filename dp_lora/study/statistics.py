"""Means over seeds with 95% intervals, and differences of two of them, by scipy."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
Limits = tuple[float, float]  # the lowest and highest possible value of a score
UNLIMITED: Limits = (-math.inf, math.inf)


@dataclass(frozen=True)
class Mean:
    """A mean over `n` seeds; one seed alone gives no interval: `low` and `high` are None."""

    value: float
    low: float | None
    high: float | None
    n: int

    def shown(self, write: Callable[[float], str]) -> tuple[str, str]:
        """The mean and the interval as a table shows them; a star marks a mean of one seed."""
        if self.low is None or self.high is None:
            return f"{write(self.value)} *", ""
        return write(self.value), f"{write(self.low)} to {write(self.high)}"


def mean(values: Sequence[float], limits: Limits = UNLIMITED) -> Mean:
    """Mean of one or more values, one per seed; the interval is Student's t with n - 1 degrees of freedom.

    The interval ends at `limits`: without them it could show an accuracy above 100%.
    """
    found = np.asarray(values, dtype=np.float64)
    centre, n = float(found.mean()), len(found)
    if n == 1:
        return Mean(centre, None, None, 1)
    half = float(stats.sem(found) * stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
    return Mean(centre, max(centre - half, limits[0]), min(centre + half, limits[1]), n)


def difference(first: Sequence[float], second: Sequence[float]) -> Mean:
    """Mean of `second` less that of `first`, with Welch's interval; `n` is the smaller number of seeds.

    The result has no interval if either side has one seed alone.
    """
    a, b = (np.asarray(values, dtype=np.float64) for values in (first, second))
    centre, n = float(b.mean() - a.mean()), min(len(a), len(b))
    if n == 1:
        return Mean(centre, None, None, 1)
    if not a.std() and not b.std():
        return Mean(centre, centre, centre, n)
    with warnings.catch_warnings():
        # one side's seeds may be equal, all 926 of 1,000 pictures right: scipy would warn on the terminal
        warnings.simplefilter("ignore", RuntimeWarning)
        found = stats.ttest_ind(b, a, equal_var=False).confidence_interval(CONFIDENCE)
    return Mean(centre, float(found.low), float(found.high), n)
