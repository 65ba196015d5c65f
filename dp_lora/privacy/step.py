"""One step of DP-SGD (Abadi et al. 2016, Algorithm 1) on whole units of privacy; the proof stands beside each line.

Claim: one call of `noisy_sum` is a Poisson-subsampled Gaussian mechanism with rate q = plan.sample_rate and noise
multiplier sigma = plan.noise_multiplier / plan.sensitivity under add-or-remove-one unit; plan.sensitivity is 1 but for
the comparison below.

Proof. Let D and D' differ in one unit x.
(1) Every unit takes part by its own coin with probability q, so D and D' can share the coins of all others.
(2) The gradient of a unit depends on its own pictures and draws and on the current public weights only; the draws come
    from a stream of each picture's own, whoever else takes part; so the parts of all others are the same (up to
    rounding, which may differ with the rows that are computed together).
(3) x adds at most one vector, with norm at most C = plan.max_grad_norm over all tensors together: all of its pictures,
    and all k noise draws of each, are folded into one gradient before the one clip.
(4) Noise plan.noise_multiplier * C * N(0, 1) is added to the sum once.
So one step is the mechanism that `accounting` composes. The divisor is public (q * n_public), and what follows
(optimizer, averaging of weights, samples) sees private data through this sum alone: post-processing.

The number of ranks (processes that divide a step's units) changes nothing of this. Each drawn unit lies whole in the
share of one rank alone, which clips its gradient, taken at the first rank's weights and with the draws of its own
stream; so the sum of the ranks' sums is that of (3), up to rounding. Coins, ledger line and noise are the first rank's
alone, and it alone receives the sums.

plan.accounting = published repeats a fault of the released code, for comparison. There (3) fails: each draw is clipped
apart, as if it were a unit, so x adds k vectors, whose sum has norm at most k * C, reached when they are parallel.
(1), (2) and (4) stand, so plan.sensitivity = k makes the claim true again; what is made so is never released.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dp_lora.errors import InputError
from dp_lora.privacy.clipping import clipped_sum
from dp_lora.privacy.gradients import LossFunction, Rows, micro_batches, unit_gradients
from dp_lora.privacy.ledger import Ledger
from dp_lora.privacy.noise import add_noise
from dp_lora.privacy.plan import PUBLISHED, PrivacyPlan
from dp_lora.privacy.randomness import ItemStreams, Randomness
from dp_lora.privacy.sampling import poisson_draw
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


@dataclass(frozen=True)
class PrivateFacts:
    """What the operator may watch; computed from private data without noise, so it carries no guarantee."""

    units: int
    loss: float  # mean over what was clipped, units as a rule; NaN for an empty draw
    mean_norm: float  # of the gradients before the clip
    clipped_share: float
    physical_batch_size: int  # rows at a time with which the sum was computed, after backing off


def sum_over_units(
    loss: LossFunction, parameters: Mapping[str, Tensor], batches: Iterable[Rows], max_grad_norm: float
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Sum of the units' clipped gradients, their norms (U,) and losses (U,); zeros and empty for no units.

    Guarantee: adding or removing one unit moves the sum by at most max_grad_norm in L2, all of its pictures and all k
    draws included, however its rows are cut into micro-batches.
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


def noisy_sum(
    plan: PrivacyPlan,
    step: int,
    units: Sequence[Sequence[int]],
    loss_factory: LossFactory,
    parameters: Mapping[str, Tensor],
    randomness: Randomness,
    ledger: Ledger,
    physical_batch_size: int,
    team: Team = Team(),  # noqa: B008 (frozen)
) -> tuple[dict[str, Tensor], PrivateFacts]:
    """Noisy sum {name: (*shape)} of the clipped gradients of a fresh Poisson draw of `units` (each a list of pictures).

    An empty draw is a step like any other: no model call, noise, a ledger line. `physical_batch_size` rows are computed
    at a time, fewer where memory ends (`sum_within_memory`; not in the reproducible mode); it changes memory, and the
    result only by rounding, as do the ranks of `team`, of which the first calls this and the others `assist`.
    PrivateFacts are for the operator alone.

    Guarantee: the noisy sum is (q, sigma)-subsampled Gaussian under add-or-remove-one unit, as proved above, and the
    ledger holds the step before its noise exists.
    """
    positions = poisson_draw(len(units), plan.sample_rate, randomness.numpy("sampling", step)).tolist()
    draws = randomness.per_item("draws", step)
    drawn = team.once(Drawn(plan, positions, draws, physical_batch_size, back_off=randomness.fresh))
    # neither the ledger's line nor the noise exists yet: an attempt that runs out of memory has spent nothing
    total, norms, losses, size = sum_over_ranks(drawn, units, loss_factory, parameters, team)
    facts = PrivateFacts(
        units=len(positions),
        loss=float(losses.mean()) if len(losses) else float("nan"),
        mean_norm=float(norms.mean()) if len(norms) else float("nan"),
        clipped_share=float((norms > plan.max_grad_norm).double().mean()) if len(norms) else float("nan"),
        physical_batch_size=size,
    )
    ledger.append(step, plan, replay_of=randomness.digest(total))
    # ================= from the next line on nothing is private =================
    if plan.private:
        total = add_noise(total, plan.noise_multiplier * plan.max_grad_norm, randomness.numpy("noise", step))
    return total, facts
