"""The clipped sum of a step's units: over micro-batches, within the device's memory, over ranks. Nothing here is noisy.

However it is computed, one unit moves the sum by at most max_grad_norm; `step` adds the noise that hides it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dp_lora.errors import InputError
from dp_lora.privacy.clipping import clipped_sum
from dp_lora.privacy.gradients import LossFunction, Rows, micro_batches, part_gradients, rows_at_once
from dp_lora.privacy.plan import FLAT, PrivacyPlan
from dp_lora.privacy.randomness import ItemStreams
from dp_lora.team import Team

# streams of the step's draws, one for each picture -> loss function of the step
LossFactory = Callable[[ItemStreams], LossFunction]
LOSS = "loss"


@dataclass(frozen=True)
class Drawn:
    """The first rank's draw for a step, sent to the other ranks; private."""

    plan: PrivacyPlan
    units: list[int]  # positions of the units that take part
    draws: ItemStreams
    physical_batch_size: int
    back_off: bool  # compute fewer rows at a time where memory runs out


def unit_gradients(
    parts: Mapping[str, Tensor], units: Sequence[int], open_unit: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Gradients (U, *shape) of whole units from those of their parts (P, *shape), which belong to `units`, ascending.

    `open_unit` is the sum of the first unit's earlier parts; empty where there are none. float64 where anything is
    added; where each unit has one part, that part.

    Guarantee: a unit's parts are added in their own order, one after the other, so that the result is the same bit for
    bit wherever the unit was cut: else a unit whose parts cancel would round anew whenever another one joins.
    """
    first: dict[int, int] = {}  # unit -> its first part
    for position, unit in enumerate(units):
        first.setdefault(unit, position)
    starts = list(first.values())
    counts = [stop - start for start, stop in pairwise([*starts, len(units)])]
    if max(counts) == 1 and not open_unit:
        return dict(parts)
    whole = {
        name: torch.zeros(len(starts), *part.shape[1:], dtype=torch.float64, device=part.device)
        for name, part in parts.items()
    }
    for name, value in open_unit.items():
        whole[name][0] = value
    for number in range(max(counts)):
        # the units that have a part of this number, each once
        rows = [row for row, count in enumerate(counts) if count > number]
        for name, part in parts.items():
            whole[name][rows] += part[[starts[row] + number for row in rows]]
    return whole


def sum_over_units(
    loss: LossFunction,
    parameters: Mapping[str, Tensor],
    batches: Iterable[Rows],
    max_grad_norm: float,
    clipping: str = FLAT,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Sum, float64, of the units' clipped gradients, their norms (U,) and losses (U,); zeros and empty for no units.

    Guarantee: adding or removing one unit moves the sum by at most max_grad_norm in L2, all of its pictures and all k
    draws included, however its rows are cut into micro-batches. Up to rounding (step.py).
    """
    total = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in parameters.items()}
    norms: list[Tensor] = []
    losses: list[Tensor] = []
    open_unit: dict[str, Tensor] = {}
    open_loss: dict[str, Tensor] = {}
    for rows in batches:
        parts, part_losses = part_gradients(loss, parameters, rows)
        # a unit that spans micro-batches is added up first and clipped once, when it is complete
        gradients = unit_gradients(parts, rows.units, open_unit)
        unit_losses = unit_gradients({LOSS: part_losses}, rows.units, open_loss)[LOSS]
        del parts
        complete = len(unit_losses) - int(rows.last_continues)
        open_unit, open_loss = {}, {}
        if rows.last_continues:
            open_unit = {name: gradient[-1].double() for name, gradient in gradients.items()}
            open_loss = {LOSS: unit_losses[-1].double()}
        if complete:
            whole = {name: gradient[:complete] for name, gradient in gradients.items()}
            partial, partial_norms = clipped_sum(whole, max_grad_norm, clipping)
            del whole
            for name in total:
                # sum, not mean: the batch size is private under Poisson sampling; popped, or it would stay in memory
                # beside the next micro-batch's gradients
                total[name] += partial.pop(name)
            norms.append(partial_norms)
            losses.append(unit_losses[:complete])
        del gradients  # or they would stay in memory beside the next micro-batch's
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
    clipping: str = FLAT,
) -> tuple[dict[str, Tensor], Tensor, Tensor, int]:
    """`sum_over_units` of the drawn `units`, and its rows at a time; `draws` are the units' streams for this step.

    Where the device's memory runs out, half as many rows are tried. Raises InputError where one row does not fit, or,
    without `back_off`, where `physical_batch_size` rows do not.

    Guarantee: that of `sum_over_units`. Backing off is no second mechanism: the units were drawn before and stay, each
    attempt begins its own sum with every stream at its first draw, so no draw is lost or repeated, and only a complete
    sum comes out. It equals that of the first attempt up to rounding, whatever the memory was.
    """
    device = next(iter(parameters.values())).device
    size = rows_at_once(k, physical_batch_size)
    while True:
        try:
            # a failed attempt has moved its streams on
            loss = loss_factory(draws.from_the_start())
            batches = micro_batches(units, k, size, device)
            return *sum_over_units(loss, parameters, batches, max_grad_norm, clipping), size
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
        # only outside the except block are the failed attempt's frames, and with them its tensors, freed
        torch.cuda.empty_cache()
        size = rows_at_once(k, size // 2)


def sum_over_ranks(
    drawn: Drawn,
    units: Sequence[Sequence[int]],
    loss_factory: LossFactory,
    parameters: Mapping[str, Tensor],
    team: Team,
) -> tuple[dict[str, Tensor], Tensor, Tensor, int]:
    """`sum_within_memory` of the drawn units, divided among the ranks of `team`: on the first, nothing on the others.

    `parameters` of the other ranks become those of the first. The rows at a time are the same on all ranks: where one
    rank's memory runs out, the others compute their shares anew with as few rows.

    Guarantee: that of `sum_over_units`, whatever the number of ranks: no unit is divided, none is in two shares, and
    all micro-batches of the step have one shape.
    """
    team.copy(parameters)
    plan, k = drawn.plan, drawn.plan.draws_per_clip
    # as published, a picture stands once for each of its draws, and every draw gets a clip of its own
    share = [units[position] for position in team.share(drawn.units) for _ in range(plan.k // k)]

    def computed(rows: int) -> tuple[dict[str, Tensor], Tensor, Tensor, int]:
        return sum_within_memory(
            loss_factory, drawn.draws, parameters, share, k, plan.max_grad_norm, rows, drawn.back_off, plan.clipping
        )

    part, norms, losses, rows = computed(drawn.physical_batch_size)
    # kernels round differently in another shape: a unit that joins moves others from rank to rank (step.py, (5 b))
    while len(sizes := team.once(sorted(set(team.gather(rows))))) > 1:
        if rows > sizes[0]:
            part, norms, losses, rows = computed(sizes[0])
    total = team.sum(part)
    facts = team.gather((norms.cpu(), losses.cpu()))
    if team.first:
        norms, losses = (torch.cat([fact[position] for fact in facts]) for position in (0, 1))
    return total, norms, losses, rows


def assist(
    units: Sequence[Sequence[int]], loss_factory: LossFactory, parameters: Mapping[str, Tensor], team: Team
) -> None:
    """Work of every rank but the first: its share of each `noisy_sum`, until the first sends None in its place.

    Guarantee: its sums go to the first rank alone; it tosses no coin, draws no noise, and releases nothing.
    """
    while (drawn := team.once()) is not None:
        sum_over_ranks(drawn, units, loss_factory, parameters, team)
