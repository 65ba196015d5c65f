"""An auditor's numbers from the canaries' measurements: scores to guess by, and direct numbers.

Each direct number measures one thing that the proof in step.py needs:

    noise    spread of a coordinate along which no unit pulls, over the stated spread: 1, or more
    lag      correlation of the noise of successive steps: 0
    jump     mean of a canary's coordinate over steps, over q clips: 1 for a unit that is drawn with probability q and
             moves the sum by one clip; more is a higher rate or a longer jump
    divisor  spread of the mean gradient without one more unit, over the spread with it: 1
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dp_lora.errors import InputError

JUMPS = (1, 4, 12)  # clips by which a canary may move its coordinate: one, and several where draws are clipped apart
SCORES = len(JUMPS) + 1  # number of scores of `scores_of`
WIDE = 1.96  # standard deviations: half of a 95% interval
CONVICTS = 2.0  # such halves: a right step's number lies further off with probability below 1e-4


@dataclass(frozen=True)
class Measured:
    """A direct number with the half-width of its 95% interval (normal), and its value for a right step."""

    value: float
    half: float
    right: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.half:.3f}"

    def is_above(self) -> bool:
        """Whether it is above a right step's number, by CONVICTS times half of its interval.

        Guarantee: true for a right step with a probability of about 5e-5.
        """
        return self.value - self.right > CONVICTS * self.half

    def is_below(self) -> bool:
        """Whether it is below, as `is_above`.

        Guarantee: that of `is_above`.
        """
        return self.right - self.value > CONVICTS * self.half


def scores_of(seen: NDArray[np.float64], q: float, sigma: float) -> dict[str, NDArray[np.float64]]:
    """One number per canary, high where it seems to be in, from its measurements `seen` (steps, m) in clips.

    `jump J`: log-likelihood ratio of 'in', which moves the coordinate by J clips with probability `q` in each step,
    under noise `sigma`. `differences`: squares of successive differences, each cut at 1: noise that is used again
    cancels in them.

    Guarantee: they depend on `seen` and on public numbers alone.
    """
    with np.errstate(divide="ignore"):
        absent, present = np.log1p(-q), np.log(q)
    found = {
        f"jump {jump}": np.logaddexp(absent, present + (jump * seen - jump**2 / 2) / sigma**2).sum(axis=0)
        for jump in JUMPS
    }
    return found | {"differences": np.minimum(np.diff(seen, axis=0) ** 2, 1).sum(axis=0)}


def direct_numbers(
    seen: NDArray[np.float64], coins: NDArray[np.bool_], q: float, sigma: float
) -> tuple[Measured, Measured, Measured]:
    """Noise, lag and jump, as at the head of this file. InputError where no canary is in, or none out.

    Guarantee: of a right step each interval holds its number with a probability of about 95%.
    """
    out, into = seen[:, ~coins], seen[:, coins]
    if not out.size or not into.size:
        raise InputError("audit.canaries: all coins fell alike; take more canaries")
    pairs = max(1, out[1:].size)
    noise = float(np.sqrt(np.mean(out**2))) / sigma
    lag = float((out[:-1] * out[1:]).sum()) / pairs / float(np.mean(out**2)) if noise else 0.0
    half_jump = WIDE * math.sqrt(sigma**2 + q) / q / math.sqrt(into.size)
    return (
        Measured(noise, WIDE / math.sqrt(2 * out.size), 1.0),
        Measured(lag, WIDE / math.sqrt(pairs), 0.0),
        Measured(float(into.mean()) / q, half_jump, 1.0),
    )


def divisor_number(with_unit: NDArray[np.float64], without: NDArray[np.float64]) -> Measured:
    """Mean spread without the unit over mean spread with it.

    Guarantee: that of `direct_numbers`.
    """
    spread = float(with_unit.mean())
    if not spread:
        return Measured(1.0, 0.0, 1.0)  # no noise: the divisor shows nothing, and `noise` convicts
    ratio = float(without.mean()) / spread
    error = math.sqrt(sum(float(world.var()) / len(world) / float(world.mean()) ** 2 for world in (with_unit, without)))
    return Measured(ratio, WIDE * ratio * error, 1.0)
