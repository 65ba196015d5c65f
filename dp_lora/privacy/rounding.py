"""How much the sum of all other units rounds anew when one unit joins: measured on dummies, before the first step.

The proof of step.py bounds everything but the last bits of the network's kernels: (5 b). Where a kernel rounds a row
differently in another place of a micro-batch, each other unit's gradient changes a little, in a direction that it does
not share with the others, so that the change of their sum grows as the square root of their number.

Every dummy is scaled to one norm here, as flat clipping scales units above C. Each of its changes then counts for more
than in a real sum: flat clipping does not scale up a unit below C, and automatic clipping divides by more than its
norm. (Except changes along the gradient itself: one direction out of as many as there are trained numbers.)
"""

import math
from collections.abc import Mapping
from itertools import cycle, islice

import torch
from torch import Tensor

from dp_lora.errors import InputError
from dp_lora.privacy.gradients import LossFunction, micro_batches, rows_at_once
from dp_lora.privacy.plan import ROUNDING, PrivacyPlan
from dp_lora.privacy.randomness import ItemStreams
from dp_lora.privacy.sums import LossFactory, sum_over_units

DUMMIES = 8  # least number of pictures
SUMMATION = 2**-12 + 2**-21  # float64's part of ROUNDING: step.py (5 a)
MARGIN = 2.0  # for weights and pictures that round worse than those measured
NUDGE = 0.01  # a hundred steps move a weight by about this: LoRA's B begins at 0, and so does A's gradient
PERSONS = 1, 2, 3  # pictures of the dummies, in turn
CLIP = 2.0**-60  # below every gradient that is not zero: every unit is clipped, and its change counts whole


def rest(
    loss_factory: LossFactory, parameters: Mapping[str, Tensor], units: list[list[int]], k: int, rows: int
) -> float:
    """Norm of the change in the sum of units[1:] when units[0] joins them, in units of max_grad_norm.

    `units` are lists of the pictures that `loss_factory` knows, and all are clipped. `rows` are computed at a time.

    Guarantee: none: it is a measurement, of public dummies or in tests.
    """
    device = next(iter(parameters.values())).device

    def total(chosen: list[list[int]]) -> dict[str, Tensor]:
        loss: LossFunction = loss_factory(ItemStreams(0))
        return sum_over_units(loss, parameters, micro_batches(chosen, k, rows, device), CLIP)[0]

    together, others, joiner = total(units), total(units[1:]), total(units[:1])
    squares = [(together[n] - others[n] - joiner[n]).square().sum() for n in together]
    return float(torch.stack(squares).sum().sqrt()) / CLIP


def require_small_rounding(
    plan: PrivacyPlan, loss_factory: LossFactory, parameters: Mapping[str, Tensor], rows: int
) -> None:
    """InputError where kernels on this device round by more than the plan's noise covers.

    `loss_factory` is that of a training, over at least `dummies(plan, rows)` dummy pictures. The weights are moved by
    NUDGE, so that every tensor has a gradient. Where a unit is a person, dummies have PERSONS pictures.

    Guarantee: what passes was measured, near these weights and at these shapes on this device, to keep (5) of step.py
    for an expected batch, with a margin of MARGIN. It was measured twice: the joining unit moves the others by one
    place, and by half a micro-batch. The encoder of pictures is not measured: `latents` gives all of its batches one
    shape. It reads nothing private.
    """
    if not plan.private:
        return
    k = plan.draws_per_clip
    generator = torch.Generator().manual_seed(0)
    weights = {name: weight + NUDGE * _normal(weight, generator) for name, weight in parameters.items()}
    pictures, others = iter(range(1, dummies(plan, rows))), list[list[int]]()
    for size in cycle(PERSONS if plan.unit == "person" else (1,)):
        if not (unit := list(islice(pictures, size))):
            break
        others.append(unit)
    # a joiner of n pictures moves each of the others by n places
    joiners = {1, max(1, rows_at_once(k, rows) // k // 2)}
    measured = max(rest(loss_factory, weights, [[0] * joiner, *others], k, rows) for joiner in joiners)
    expected = measured * math.sqrt(plan.expected_batch * plan.k / k / len(others))
    if not MARGIN * expected <= ROUNDING - SUMMATION:
        raise InputError(
            f"rounding on this device: a unit that joins would change the sum of the others by {expected:.2g} of "
            f"max_grad_norm, and the noise covers {ROUNDING:g}; set compute.precision=float32, or fewer rows by "
            "compute.physical_batch_size"
        )


def dummies(plan: PrivacyPlan, rows: int) -> int:
    """Number of dummy pictures that fill a micro-batch and begin another one, and at least DUMMIES + 1.

    Guarantee: a function of public numbers.
    """
    return max(DUMMIES, rows // plan.draws_per_clip) + 1


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers, drawn on the CPU, so that every device gets the same ones."""
    return torch.randn(like.shape, generator=generator).to(like)
