"""One step of DP-SGD (Abadi et al. 2016, Algorithm 1) on whole units of privacy; the proof stands beside each line.

Claim: one call of `noisy_sum` is at least as private as a Poisson-subsampled Gaussian mechanism with rate
q = plan.sample_rate and noise multiplier sigma = plan.noise_multiplier / plan.sensitivity under add-or-remove-one unit.
plan.sensitivity is 1 + ROUNDING except in the comparison below.

Proof. Let D and D' differ in one unit x.
(1) Every unit takes part by its own coin with probability q, so D and D' can share the coins of all others.
(2) The gradient of a unit depends on its own pictures and draws and on the current public weights only. The draws come
    from a stream of each picture's own, whoever else takes part. (x shifts the numbers of others' streams; all streams
    are independent and alike, so D and D' can share the draws of all others.) So the parts of all others are the same,
    up to the rounding of (5).
(3) x adds at most one vector, with norm at most C = plan.max_grad_norm over all tensors together: all of its pictures,
    and all k noise draws of each, are folded into one gradient before the one clip. The clip is flat or automatic
    (plan.clipping); clipping.py proves that both keep to C.
(4) Noise plan.noise_multiplier * C * N(0, 1) is added to the sum once.
(5) Rounding moves the sum by at most ROUNDING * C more, so by at most plan.sensitivity * C in all:
    (a) A unit's parts are added up in their own order, clipped and summed in float64. A sum of n <= 2^20 clipped
        vectors is off by at most n^2 * 2^-53 C <= 2^-13 C in any order, so two sums differ by at most 2^-12 C. (More
        units than that are drawn with probability below e^-100000: plan refuses an expected batch above 2^18, and
        `require_stated_number` more than twice as many units as n_public says.) Each vector's norm may pass C by
        (m + 6) 2^-53 C, as clipping.py says: below 2^-22 C for up to 2^30 trained numbers m. In all 2^-12 C + 2^-21 C.
    (b) A part's gradient is computed in float32, or behind a forward pass in bfloat16. x moves the parts of others to
        other places in their micro-batches, or to another rank's, of the same device. All micro-batches have one shape,
        no part is divided, and padding belongs to nobody, so the same kernels do the same operations for a part in
        every place but for the last bits. No theorem bounds their total for every network and every picture
        (think of a person whose two pictures' gradients nearly cancel). Here the claim rests on an assumption: at no
        step does it pass the rest of ROUNDING. `rounding.py` measures it on dummy pictures, with the network and the
        weights at hand, before the first step, adds it up to the expected batch as independent errors add up, doubles
        it, and refuses to train where it passes. The latents of pictures are made before the first step, in batches of
        one shape, on one kind of device; the same assumption covers that x moves them to other places there.
So one step is at least as private as the mechanism that `accounting` composes. The divisor is public (q * n_public).
What follows (rounding to the weights' own type, optimizer, averaging of weights, samples) sees private data through
this sum alone: post-processing.

The number of ranks (processes that divide a step's units) changes nothing of this. Each drawn unit lies whole in the
share of one rank alone, which clips its gradient, taken at the first rank's weights and with the draws of its own
stream; so the sum of the ranks' sums is that of (3), up to (5). Coins, ledger line and noise are the first rank's
alone, and it alone receives the sums.

plan.accounting = published repeats a fault of the released code, for comparison. There (3) fails: each draw is clipped
apart, as if it were a unit, so x adds k vectors, whose sum has norm at most k * C, reached when they are parallel.
(1), (2), (4) and (5) stand, so plan.sensitivity = k * (1 + ROUNDING) makes the claim true again; a result made so is
never released.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from dp_lora.privacy.clipping import clip_factors
from dp_lora.privacy.ledger import Ledger
from dp_lora.privacy.noise import add_noise, require_wide
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.privacy.randomness import Randomness
from dp_lora.privacy.sampling import poisson_draw
from dp_lora.privacy.sums import Drawn, LossFactory, sum_over_ranks
from dp_lora.team import Team


@dataclass(frozen=True)
class PrivateFacts:
    """Numbers for the operator alone; computed from private data without noise, so they carry no guarantee."""

    units: int
    loss: float  # mean over the clipped gradients, one per unit as a rule; NaN for an empty draw
    mean_norm: float  # of the gradients before the clip
    clipped_share: float  # share of gradients scaled by less than 1
    physical_batch_size: int  # rows at a time in the sum, after backing off


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
    at a time, fewer where memory runs out (`sum_within_memory`; not in the reproducible mode); it changes memory, and
    the result only by rounding, as do the ranks of `team`. The first rank calls this, the others call `assist`.
    PrivateFacts are for the operator alone. InputError for a parameter that is narrower than float32.

    Guarantee: where plan.private, the noisy sum is at least as private as the (q, sigma)-subsampled Gaussian under
    add-or-remove-one unit, as proved above; without privacy there is none. The ledger holds the step before its noise
    exists.
    """
    require_wide(parameters)
    positions = poisson_draw(len(units), plan.sample_rate, randomness.numpy("sampling", step)).tolist()
    draws = randomness.per_item("draws", step)
    drawn = team.once(Drawn(plan, positions, draws, physical_batch_size, back_off=randomness.fresh))
    # neither the ledger's line nor the noise exists yet: an attempt that runs out of memory has spent nothing
    total, norms, losses, size = sum_over_ranks(drawn, units, loss_factory, parameters, team)
    facts = PrivateFacts(
        units=len(positions),
        loss=float(losses.mean()) if len(losses) else float("nan"),
        mean_norm=float(norms.mean()) if len(norms) else float("nan"),
        clipped_share=float((clip_factors(norms, plan.max_grad_norm, plan.clipping) < 1).double().mean())
        if len(norms)
        else float("nan"),
        physical_batch_size=size,
    )
    ledger.append(step, plan, replay_of=randomness.digest(total))
    # ================= from the next line on nothing is private =================
    if plan.private:
        total = add_noise(total, plan.noise_multiplier * plan.max_grad_norm, randomness.numpy("noise", step))
    return {name: value.to(parameters[name].dtype) for name, value in total.items()}, facts


def mean_gradient(total: Mapping[str, Tensor], plan: PrivacyPlan) -> dict[str, Tensor]:
    """A noisy sum over the expected batch: the gradient that an optimizer gets.

    Guarantee: the divisor is public. The true batch size is private under Poisson sampling, and would show in the
    spread of the noise.
    """
    return {name: value / plan.expected_batch for name, value in total.items()}
