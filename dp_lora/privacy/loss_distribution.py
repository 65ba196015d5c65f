"""Privacy loss distribution (PLD) of composed Poisson-subsampled Gaussian steps: an upper bound on epsilon.

One step is put on a grid of losses by connect-the-dots (Doroshenko et al. 2022): a cell's mass under both neighbours
goes to its two ends, so that both masses are kept. Whatever the grid, the original is then a post-processing
of the result, so the curve of delta over epsilon lies on or above the true one, and composition keeps that order.

The steps are convolved by FFT, after the distribution was tilted by exp(tilt * loss) and before it is tilted back. This
changes nothing but the rounding. An FFT is exact to about steps * 2^-52 of its largest values. The tilt moves these to
where epsilon is; without it the error exceeds a small delta: dp-accounting 0.6, which has no tilt, prints an epsilon
0.5% below the exact one of the Gaussian at 10^6 steps and delta 1e-10. The rounding that is left is added to delta.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.fft import irfft, next_fast_len, rfft
from scipy.signal import lfilter
from scipy.special import logsumexp, ndtr, ndtri

Array = npt.NDArray[np.float64]

GRID = 0.05  # cell over the change of loss that moves epsilon: it costs about 3e-4 of epsilon
MOST_POINTS = 2**21  # of one grid: about 300 MB
TAIL = 1e-5  # share of delta that all cut tails together cost at most
MISSED = 28.0  # -log of the tilted mass beyond each end of the FFT's window
TILTS = np.geomspace(1e-3, 1e8, 140)
COARSE = 200  # cells of the rough estimate that sizes the grid
ROUNDED = 2.0**-49  # of a step's mean loss; seen: 2^-54


@dataclass(frozen=True)
class Pair:
    """Neighbours' distributions of one step: noise N(0, sigma^2), and mixture (1 - q) N(0, .) + q N(1, sigma^2).

    `removed`: the mixture is upper, the noise lower, and the loss log(upper / lower) grows with x. Else, with a unit
    added, the two change places, and x is mirrored, so that the loss grows with x too. `cut` is a probability.
    """

    sample_rate: float
    sigma: float
    removed: bool
    cut: float

    @property
    def x_range(self) -> tuple[float, float]:
        """The interval in which nearly all of upper lies.

        Guarantee: at most `cut` of it lies beyond each end; this part is rounded up, or counts as an infinite loss.
        """
        reach = -self.sigma * float(ndtri(self.cut / 2))
        drawn = -self.sigma * float(ndtri(min(self.cut / (2 * self.sample_rate), 0.5)))
        return (-reach, max(reach, 1 + drawn)) if self.removed else (-reach, reach)

    def loss(self, x: Array) -> Array:
        """log(upper / lower) at x.

        Guarantee: exact but for the last digit.
        """
        sign = 1 if self.removed else -1
        exponent = (sign * x - 0.5) / self.sigma**2
        with np.errstate(divide="ignore"):
            return sign * np.logaddexp(np.log1p(-self.sample_rate), np.log(self.sample_rate) + exponent)

    def x_of_loss(self, loss: Array) -> Array:
        """Inverse of `loss`; infinite beyond the range of losses.

        Guarantee: the loss at the result is `loss` but for its last digit.
        """
        q, sign = self.sample_rate, 1 if self.removed else -1
        mixed = sign * loss
        with np.errstate(divide="ignore", invalid="ignore"):
            # log((exp(mixed) - 1 + q) / q), near 0 and elsewhere in the form that loses no digits; below -700 there is
            # a loss for q = 1 alone, whose first term is 0
            near = np.log1p(np.expm1(np.clip(mixed, -0.7, 0.7)) / q)
            far = mixed + np.log1p((q - 1) * np.exp(np.minimum(-mixed, 700.0))) - math.log(q)
        exponent = np.where(np.abs(mixed) > 0.7, far, near)
        return sign * (0.5 + self.sigma**2 * np.where(np.isnan(exponent), -np.inf, exponent))

    def masses(self, x: Array) -> tuple[Array, Array]:
        """Probabilities between neighbouring x, which ascend, under upper and lower.

        Guarantee: each is exact but for the last digits, relative to the tail that it lies in.
        """
        centre = 1 if self.removed else -1
        noise = _normal_between(x / self.sigma)
        drawn = _normal_between((x - centre) / self.sigma)
        mixture = (1 - self.sample_rate) * noise + self.sample_rate * drawn
        return (mixture, noise) if self.removed else (noise, mixture)


def _normal_between(z: Array) -> Array:
    """Standard normal probabilities between neighbours, right relative to the tail that they lie in."""
    below, above = ndtr(z), ndtr(-z)
    return np.maximum(np.where(z[:-1] > 0, above[:-1] - above[1:], below[1:] - below[:-1]), 0.0)


@dataclass(frozen=True)
class Losses:
    """Probabilities of the losses (first + i) * cell, i = 0, 1, ..., and of an infinite loss."""

    cell: float
    first: int
    probabilities: Array
    infinite: float

    @property
    def values(self) -> Array:
        """The finite losses, ascending.

        Guarantee: neighbours are one cell apart.
        """
        return np.arange(self.first, self.first + len(self.probabilities), dtype=np.float64) * self.cell


def _one_step(pair: Pair, cell: float, lowest: float) -> Losses | None:
    """Connect-the-dots of one step; losses below `lowest` are rounded up to it. None for more than MOST_POINTS.

    Guarantee: its delta is at or above that of `pair` at every epsilon, for any cell and lowest loss.
    """
    low, high = pair.loss(np.array(pair.x_range))
    first, last = math.floor(max(low, lowest) / cell), math.ceil(high / cell)
    if last - first > MOST_POINTS:
        return None
    values = np.arange(first, last + 1, dtype=np.float64) * cell
    upper, lower = pair.masses(np.concatenate([[-np.inf], pair.x_of_loss(values), [np.inf]]))
    # a cell from loss a to b: upper = u + v and lower = u exp(-a) + v exp(-b) give u at a and v at b
    inside = upper[1:-1]
    with np.errstate(over="ignore", invalid="ignore"):
        lower_at_a = lower[1:-1] * np.exp(values[:-1])
    # masses too small for all their digits, and losses too large for exp: all of the cell's mass is rounded up
    exact = (lower[1:-1] > np.finfo(np.float64).tiny) & np.isfinite(lower_at_a)
    lower_at_a = np.where(exact, lower_at_a, 0.0)
    at_b = np.clip((inside - lower_at_a) / -math.expm1(-cell), 0.0, inside)
    probabilities = np.append(inside - at_b, 0.0)
    probabilities[1:] += at_b
    probabilities[0] += upper[0]
    return Losses(cell, first, probabilities, float(upper[-1]))


def _composed(parts: Sequence[tuple[Losses, int]], tilt: float) -> Losses | None:
    """The loss of independent steps, within a window about the tilted mean; None for more than MOST_POINTS.

    `parts`: the losses of each kind of step, all with one cell, and the number of its steps.

    Guarantee: its delta is at or above that of the composition at every epsilon not below the window. Mass above the
    window counts as infinite; mass below it is counted inside; the FFT's rounding is added everywhere.
    """
    tilts = [_tilted(step, tilt) for step, _ in parts]
    total, cell = sum(steps for _, steps in parts), parts[0][0].cell
    start = sum(steps * step.first for step, steps in parts)
    end = sum(steps * (step.first + len(step.probabilities) - 1) for step, steps in parts)
    seen = [(step.values[t > 0], t[t > 0], steps) for (step, steps), (t, _) in zip(parts, tilts, strict=True)]
    first, last = _window(seen, cell)
    first, last = max(first, start), min(last, end)
    if last - first >= MOST_POINTS:
        return None
    size = next_fast_len(max(last - first + 1, 16), real=True)
    logs, log_mgf, finite = np.zeros(size // 2 + 1, dtype=np.complex128), 0.0, 0.0
    for (step, steps), (tilted, own_mgf) in zip(parts, tilts, strict=True):
        frequencies = rfft(np.bincount(np.arange(len(tilted)) % size, weights=tilted, minlength=size))
        with np.errstate(divide="ignore"):
            logs = logs + steps * np.log(frequencies)
        log_mgf += steps * own_mgf
        finite += steps * math.log1p(-step.infinite)
    magnitudes = np.exp(np.real(logs))
    large = magnitudes > 2.0**-80
    powers = np.zeros_like(logs)
    powers[large] = np.exp(logs[large])
    convolved = np.maximum(np.roll(irfft(powers, size), -((first - start) % size)), 0.0)
    # a frequency's rounding is at most about (8 + log2 size) 2^-52, relative to 1, and to the power of its steps
    convolved += 2.0**-52 * (total + len(parts)) * (8 + math.log2(size)) * magnitudes.mean()
    back = log_mgf - tilt * cell * np.arange(first, first + size + 1, dtype=np.float64)
    # beyond 600, the mass that was added for rounding alone is far above any delta
    probabilities = convolved * np.exp(np.minimum(back[:-1], 600.0))
    beyond = math.exp(min(float(back[-1]) - MISSED, 0.0))
    return Losses(cell, first, probabilities, beyond - math.expm1(finite))


def _tilted(step: Losses, tilt: float) -> tuple[Array, float]:
    """A step's probabilities times exp(tilt * loss), scaled to sum 1, and the log of the divisor."""
    with np.errstate(divide="ignore"):
        weights = np.log(step.probabilities) + tilt * step.values
    log_mgf = float(logsumexp(weights))
    return np.exp(weights - log_mgf), log_mgf


def _window(parts: Sequence[tuple[Array, Array, int]], cell: float) -> tuple[int, int]:
    """Grid points beyond which at most exp(-MISSED) of the composed tilted mass lies on either side, by Chernoff.

    `parts`: the losses of each kind of step, their tilted mass, and the number of its steps.
    """
    means = [float(tilted @ values) for values, tilted, _ in parts]
    kinds = [(values - mean, tilted, steps) for (values, tilted, steps), mean in zip(parts, means, strict=True)]
    deviation = max(math.sqrt(sum(steps * float(tilted @ away**2) for away, tilted, steps in kinds)), cell)
    centre = sum(steps * mean for (_, _, steps), mean in zip(parts, means, strict=True))
    ends = []
    for sign in (-1, 1):
        with np.errstate(over="ignore"):
            excess = [
                (sum(steps * math.log(tilted @ np.exp(sign * t * away)) for away, tilted, steps in kinds) + MISSED) / t
                for t in 2.0 ** np.arange(-4, 5) / deviation
            ]
        ends.append(centre + sign * min(excess))
    # a bound that overflowed is infinite: nothing lies beyond the ends of the values
    low = max(ends[0], sum(steps * float(values[0]) for values, _, steps in parts))
    high = min(ends[1], sum(steps * float(values[-1]) for values, _, steps in parts))
    return math.floor(low / cell), math.ceil(high / cell)


def _epsilon(composed: Losses, delta: float) -> float:
    """The least epsilon >= 0, not below the window, whose delta is at most `delta`; inf where there is none."""
    if composed.infinite >= delta:
        return math.inf
    some = composed.values > 0
    values, probabilities = composed.values[some], composed.probabilities[some]
    if not len(values):
        return 0.0
    # at grid points from above: delta(eps) = infinite + sum over losses >= eps of p - p exp(eps - loss)
    upper = np.cumsum(probabilities[::-1])[::-1]
    lower = lfilter([1.0], [1.0, -math.exp(-composed.cell)], probabilities[::-1])[::-1]
    passed = np.flatnonzero(composed.infinite + upper - lower > delta)
    after = int(passed[-1]) + 1 if len(passed) else 0
    # between this grid point and the one below, the sum runs over the same losses
    floor = max(float(values[after]) - composed.cell, 0.0)
    room = composed.infinite + float(upper[after]) - delta
    return max(floor, float(values[after]) + math.log(room / float(lower[after]))) if room > 0 else floor


def _tilt_and_scale(pairs: Sequence[tuple[Pair, int]], delta: float) -> tuple[float, float]:
    """The tilt where Chernoff's bound on epsilon (Renyi's, of order tilt + 1) is least, and that bound, roughly."""
    exponents = 0.0
    for pair, steps in pairs:
        x = np.linspace(*pair.x_range, COARSE + 1)
        losses = pair.loss((x[1:] + x[:-1]) / 2)
        exponents = exponents + steps * logsumexp(TILTS[:, None] * losses, b=pair.masses(x)[0], axis=1)
    bound = (exponents - math.log(delta)) / TILTS
    best = int(np.argmin(bound))
    return float(TILTS[best]), max(float(bound[best]), 1e-12)


def epsilon_bound_of_all(kinds: Sequence[tuple[float, float, int]], delta: float) -> float:
    """An upper bound on epsilon of all steps together, nearly always within 1e-3 (relative) of it; inf for none.

    `kinds`: rate in (0, 1], noise multiplier above 0 and number of steps, at least 1, of each kind of step.
    Delta in (0, 1). The grid is a function of these alone. The same unit joins or leaves in all steps at once, so that
    all losses are of one side: all with the unit removed, or all with it added.

    Guarantee: all steps together are (result, delta)-DP under add-or-remove-one, where each is the Poisson-subsampled
    Gaussian of its own rate and noise on the same data, in whatever order they are taken.
    """
    total = sum(steps for _, _, steps in kinds)
    removed, added = (
        [(Pair(rate, noise, side, TAIL * delta / total), steps) for rate, noise, steps in kinds]
        for side in (True, False)
    )
    tilt, scale = _tilt_and_scale(removed, delta)

    def bound_on_grid_of(scale: float) -> float:
        # a cell adds up to its square to a step's variance; this keeps their sum too small to move epsilon much
        cell = GRID * scale / math.sqrt(total * (scale - 2 * math.log(delta)))
        # one tilt for both sides: right near the larger epsilon, which is the result
        return max(_bound_of(pairs, delta, cell, -2 * scale, tilt) for pairs in (removed, added))

    bound = bound_on_grid_of(scale)
    if 0 < bound < scale / 2:
        # Chernoff's bound is far off for one or few steps at a small rate; both results are upper bounds
        bound = min(bound, bound_on_grid_of(bound))
    return bound + total * ROUNDED  # a step's masses are rounded too, which moves its mean loss


def _bound_of(pairs: Sequence[tuple[Pair, int]], delta: float, cell: float, lowest: float, tilt: float) -> float:
    while True:
        parts = [(step, steps) for pair, steps in pairs if (step := _one_step(pair, cell, lowest)) is not None]
        composed = _composed(parts, tilt) if len(parts) == len(pairs) else None
        if composed is not None:
            return _epsilon(composed, delta)
        cell *= 2
