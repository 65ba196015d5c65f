"""Means over seeds and differences of two of them, with 95% intervals by Student's t.

An interval is the wider of two: by the condition's own seeds, which may be equal by chance, and by a standard deviation
that is pooled over a study's conditions, which may hide that one condition varies more than the others.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
Limits = tuple[float, float]  # the lowest and highest possible value of a score
UNLIMITED: Limits = (-math.inf, math.inf)


@dataclass(frozen=True)
class Spread:
    """The standard deviation over seeds, in the score's unit, and its degrees of freedom."""

    deviation: float
    freedom: int

    def times(self, scale: float) -> "Spread":
        """The spread of values that are multiplied by `scale`."""
        return Spread(scale * self.deviation, self.freedom)


@dataclass(frozen=True)
class Mean:
    """A mean over `n` seeds; where seeds show no spread, or one is alone, `low` and `high` are None."""

    value: float
    low: float | None
    high: float | None
    n: int

    def shown(self, write: Callable[[float], str]) -> tuple[str, str]:
        """The mean and the interval as a table shows them; a star marks a mean without an interval."""
        if self.low is None or self.high is None:
            return f"{write(self.value)} *", ""
        return write(self.value), f"{write(self.low)} to {write(self.high)}"


def spread(groups: Iterable[Sequence[float]]) -> Spread:
    """The standard deviation pooled over conditions, a sequence of values per condition, one per seed.

    Three seeds that happen to be equal would alone claim certainty. A condition with one seed adds nothing.
    """
    # less the first value, so that equal values have a deviation of exactly 0
    shifted = [np.asarray(values, dtype=np.float64) - values[0] for values in groups if len(values) > 1]
    freedom = sum(len(values) - 1 for values in shifted)
    squares = math.fsum(len(values) * values.var() for values in shifted)
    return Spread(math.sqrt(squares / freedom) if freedom else 0.0, freedom)


def mean(values: Sequence[float], limits: Limits = UNLIMITED, pool: Spread | None = None) -> Mean:
    """Mean of one or more values, one per seed; its interval is the wider of those by its own seeds and by `pool`.

    The interval ends at `limits`: without them it could show an accuracy above 100%.
    """
    found = _around(float(np.mean(values)), [values], pool)
    if found.low is None or found.high is None:
        return found
    return Mean(found.value, max(found.low, limits[0]), min(found.high, limits[1]), found.n)


def difference(first: Sequence[float], second: Sequence[float], pool: Spread | None = None) -> Mean:
    """Mean of `second` less that of `first`; its interval is the wider of Welch's and the one by `pool`.

    `n` is the smaller number of seeds. If that is 1, the result has no interval.
    """
    return _around(float(np.mean(second) - np.mean(first)), [first, second], pool)


def _around(centre: float, sides: Sequence[Sequence[float]], pool: Spread | None) -> Mean:
    """`centre`, a sum or difference of the means of `sides`, with its interval."""
    n = min(map(len, sides))
    if n == 1:
        return Mean(centre, None, None, n)
    variances = [spread([values]).deviation ** 2 / len(values) for values in sides]
    half = 0.0
    if sum(variances):
        # Welch and Satterthwaite; of one side these are its own degrees of freedom
        shares = (v**2 / (len(values) - 1) for v, values in zip(variances, sides, strict=True))
        half = _quantile(sum(variances) ** 2 / sum(shares)) * math.sqrt(sum(variances))
    if pool and pool.deviation:
        error = pool.deviation * math.sqrt(sum(1 / len(values) for values in sides))
        half = max(half, _quantile(pool.freedom) * error)
    return Mean(centre, centre - half, centre + half, n) if half else Mean(centre, None, None, n)


def _quantile(freedom: float) -> float:
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))
