"""The clipped sum of a step's units: over micro-batches, within the device's memory, over ranks. Nothing here is noisy.

However it is computed, one unit moves the sum by at most max_grad_norm; `step` adds the noise that hides it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dp_lora.errors import InputError
from dp_lora.privacy.clipping import clipped_sum
from dp_lora.privacy.gradients import LossFunction, Rows, micro_batches, unit_gradients
from dp_lora.privacy.plan import PUBLISHED, PrivacyPlan
from dp_lora.privacy.randomness import ItemStreams
from dp_lora.team import Team

# streams of the step's draws, one for each picture -> loss function of the step
LossFactory = Callable[[ItemStreams], LossFunction]


@dataclass(frozen=True)
class Drawn:
    """What the first rank draws for a step and the others are told; private."""

    plan: PrivacyPlan
    units: list[int]  # positions of those that take part
    draws: ItemStreams
    physical_batch_size: int
    back_off: bool  # where memory ends


def sum_over_units(
    loss: LossFunction, parameters: Mapping[str, Tensor], batches: Iterable[Rows], max_grad_norm: float
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Sum of the units' clipped gradients, their norms (U,) and losses (U,); zeros and empty for no units.

    Guarantee: adding or removing one unit moves the sum by at most max_grad_norm in L2, all of its pictures and all k
    draws included, however its rows are cut into micro-batches. Up to rounding (step.py).
    """
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    norms: list[Tensor] = []
    losses: list[Tensor] = []
    open_gradient: dict[str, Tensor] = {}
    open_loss = torch.zeros(())
    for rows in batches:
        gradients, unit_losses = unit_gradients(loss, parameters, rows)
        if rows.first_continues:
            # a unit that spans micro-batches is added up first and clipped once, when it is complete
            for name, part in open_gradient.items():
                gradients[name][0] += part
            unit_losses[0] += open_loss
        complete = rows.n_units - int(rows.last_continues)
        open_gradient = {n: gradient[-1].clone() for n, gradient in gradients.items()} if rows.last_continues else {}
        open_loss = unit_losses[-1]
        if complete:
            partial, partial_norms = clipped_sum({n: g[:complete] for n, g in gradients.items()}, max_grad_norm)
            for name, value in partial.items():
                total[name] += value  # sum, not mean: the batch size is private under Poisson sampling
            norms.append(partial_norms)
            losses.append(unit_losses[:complete])
        del gradients  # or they would lie beside the next micro-batch's
    return total, torch.cat(norms) if norms else torch.zeros(0), torch.cat(losses) if losses else torch.zeros(0)


def sum_within_memory(
    loss_factory: LossFactory,
    draws: ItemStreams,
    parameters: Mapping[str, Tensor],
    units: Sequence[Sequence[int]],
    k: int,
    max_grad_norm: float,
    physical_batch_size: int,
    back_off: bool,
) -> tuple[dict[str, Tensor], Tensor, Tensor, int]:
    """`sum_over_units` of the drawn `units`, and the rows at a time that it took; `draws` are theirs for this step.

    Where the device's memory ends, half as many rows are tried. Raises InputError where one row does not fit, or,
    without `back_off`, where `physical_batch_size` rows do not.

    Guarantee: that of `sum_over_units`. Backing off is no second mechanism: the units were drawn before and stay, each
    attempt begins its own sum with every stream at its first draw, so no draw is lost or repeated, and only a complete
    sum comes out. It equals that of the first attempt up to rounding, whatever the memory was.
    """
    device = next(iter(parameters.values())).device
    size = physical_batch_size
    while True:
        try:
            # a failed attempt has moved its streams on
            loss = loss_factory(draws.from_the_start())
            batches = micro_batches(units, k, size, device)
            return *sum_over_units(loss, parameters, batches, max_grad_norm), size
        except torch.OutOfMemoryError:
            if not back_off:
                raise InputError(
                    f"compute.physical_batch_size={size}: does not fit in the device's memory, and the reproducible "
                    "mode does not back off (another cut rounds otherwise); set fewer rows, in another folder"
                ) from None
            if size == 1:
                raise InputError(
                    "compute.physical_batch_size=1: one row does not fit in the device's memory; free it, or use a "
                    "larger device"
                ) from None
        # out here the failed attempt's tensors are gone with its frames
        torch.cuda.empty_cache()
        size //= 2


def sum_over_ranks(
    drawn: Drawn,
    units: Sequence[Sequence[int]],
    loss_factory: LossFactory,
    parameters: Mapping[str, Tensor],
    team: Team,
) -> tuple[dict[str, Tensor], Tensor, Tensor, int]:
    """`sum_within_memory` of the drawn units, divided among the ranks of `team`: on the first, nothing on the others.

    `parameters` of the other ranks become those of the first. The rows at a time are those of the rank with the least.

    Guarantee: that of `sum_over_units`, whatever the number of ranks: no unit is divided, none is in two shares.
    """
    team.copy(parameters)
    share, k = [units[position] for position in team.share(drawn.units)], drawn.plan.k
    if drawn.plan.accounting == PUBLISHED:
        share, k = [unit for unit in share for _ in range(k)], 1  # every draw gets a clip of its own
    part, norms, losses, size = sum_within_memory(
        loss_factory,
        drawn.draws,
        parameters,
        share,
        k,
        drawn.plan.max_grad_norm,
        drawn.physical_batch_size,
        drawn.back_off,
    )
    total = team.sum(part)
    facts = team.gather((norms.cpu(), losses.cpu(), size))
    if team.first:
        norms, losses = (torch.cat([fact[position] for fact in facts]) for position in (0, 1))
        size = min(fact[2] for fact in facts)
    return total, norms, losses, size


def assist(
    units: Sequence[Sequence[int]], loss_factory: LossFactory, parameters: Mapping[str, Tensor], team: Team
) -> None:
    """What every rank but the first does: its share of each `noisy_sum`, until the first says None in its place.

    Guarantee: its sums go to the first rank alone; it tosses no coin, draws no noise, and releases nothing.
    """
    while (drawn := team.once()) is not None:
        sum_over_ranks(drawn, units, loss_factory, parameters, team)
