"""Epsilon of a plan after some steps, and the noise that a target epsilon needs.

The mechanism is the Poisson-subsampled Gaussian with sensitivity 1 and noise sigma under add-or-remove-one, composed
over the steps. It is accounted twice: Opacus' PRV accountant (Gopi et al. 2021) and dp-accounting's privacy loss
distribution (PLD, pessimistic: Doroshenko et al. 2022). Both give upper bounds; the larger one is what is printed.
RDP (Mironov 2017) is reported beside them and never the headline.
"""

import functools
import math
import warnings
from dataclasses import asdict, dataclass
from typing import Any

from dp_lora.errors import InputError
from dp_lora.privacy.plan import ROUNDING, PrivacyPlan

PRV_GRID_LIMIT = 20_000_000  # points; the accountant's arrays take about 100 bytes each
LOWEST_DELTA = 1e-10  # far below it (seen at 1e-14) the PLD accountant is lost in its own rounding
DELTA_POINTS = 12  # of the curve of epsilon over delta
PLD_INTERVAL = 1e-3  # width of a PLD bin in units of epsilon; connect-the-dots makes the result exact to about 1e-4


@dataclass(frozen=True)
class Bounds:
    """Upper bounds on epsilon; `epsilon` is the larger of PRV's and PLD's. `prv` is None where its grid is too big."""

    epsilon: float
    pld: float
    prv: float | None
    rdp: float

    def as_json(self) -> dict[str, float | None]:
        return asdict(self)


NOTHING = Bounds(epsilon=0.0, pld=0.0, prv=0.0, rdp=0.0)


def pld_epsilon(
    sample_rate: float, noise_multiplier: float, steps: int, delta: float, *, pessimistic: bool = True
) -> float:
    """Epsilon by dp-accounting's PLD, or with pessimistic=False a lower bound on the same quantity.

    Guarantee: pessimistic, that of `bounds`, by this accountant alone.
    """
    composed = _composed_pld(sample_rate, noise_multiplier, steps, pessimistic)
    return float(composed.get_epsilon_for_delta(delta))


def _composed_pld(sample_rate: float, noise_multiplier: float, steps: int, pessimistic: bool) -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    pld = privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier,
        sampling_prob=sample_rate,
        pessimistic_estimate=pessimistic,
        value_discretization_interval=PLD_INTERVAL,
        # connect-the-dots exists for upper bounds only
        use_connect_dots=pessimistic,
    )
    return pld.self_compose(steps)


@functools.lru_cache(maxsize=256)
def rdp_epsilon(sample_rate: float, noise_multiplier: float, steps: int, delta: float) -> float:
    """Epsilon by Opacus' RDP accountant: looser than the others.

    Guarantee: that of `bounds`, by this accountant alone.
    """
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 'optimal order is the largest alpha': the bound holds all the same
        return float(accountant.get_epsilon(delta))


def prv_grid_points(
    sample_rate: float, noise_multiplier: float, steps: int, delta: float, eps_error: float = 0.01
) -> float:
    """Points of the grid that Opacus' PRV accountant would make: 2 L / mesh, by its rule (Gopi et al., remark 5.6).

    Guarantee: none is needed: it decides whether PRV is asked, and PLD's bound holds without it.
    """
    delta_error = delta / 1000
    mesh = eps_error / math.sqrt(steps * math.log(12 / delta_error) / 2)
    domain = max(
        rdp_epsilon(sample_rate, noise_multiplier, steps, delta_error / 4),
        rdp_epsilon(sample_rate, noise_multiplier, 1, delta_error / (8 * steps)),
        eps_error,
    )
    return 2 * (domain + 3) / mesh


def prv_epsilon(sample_rate: float, noise_multiplier: float, steps: int, delta: float) -> float | None:
    """Epsilon by Opacus' PRV accountant; None where its grid would not fit or it has no answer.

    Guarantee: that of `bounds`, by this accountant alone, where there is an answer.
    """
    from opacus.accountants import PRVAccountant

    if prv_grid_points(sample_rate, noise_multiplier, steps, delta) > PRV_GRID_LIMIT:
        return None
    accountant = PRVAccountant()
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            value = float(accountant.get_epsilon(delta))
        except (RuntimeError, ValueError):
            return None
    return value if math.isfinite(value) else None


@functools.lru_cache(maxsize=256)
def bounds(sample_rate: float, noise_multiplier: float, steps: int, delta: float) -> Bounds:
    """All bounds after `steps` steps.

    Guarantee: the composition of `steps` Poisson-subsampled Gaussian mechanisms (rate `sample_rate` in (0, 1], noise
    standard deviation `noise_multiplier` > 0 times the sensitivity) is (epsilon, delta)-DP under add-or-remove-one for
    the returned `epsilon`. Raises InputError outside these ranges.
    """
    if not 0 < sample_rate <= 1:
        raise InputError(f"sample_rate={sample_rate}: must be in (0, 1]")
    if not 0 < noise_multiplier < math.inf:
        raise InputError(f"noise_multiplier={noise_multiplier}: must be above 0 and finite")
    if not LOWEST_DELTA <= delta < 1:
        raise InputError(f"delta={delta}: must be in [{LOWEST_DELTA:g}, 1)")
    if steps < 0:
        raise InputError(f"steps={steps}: must be 0 or above")
    if steps == 0:
        return NOTHING
    pld = pld_epsilon(sample_rate, noise_multiplier, steps, delta)
    prv = prv_epsilon(sample_rate, noise_multiplier, steps, delta)
    rdp = rdp_epsilon(sample_rate, noise_multiplier, steps, delta)
    return Bounds(epsilon=max(pld, prv or 0.0), pld=pld, prv=prv, rdp=rdp)


def spent(plan: PrivacyPlan, steps: int) -> Bounds:
    """Bounds after `steps` ledger entries of a plan: a function of these two and of nothing else.

    The noise counts over what one unit really moves the sum by: plan.sensitivity times max_grad_norm. InputError for a
    plan without privacy.

    Guarantee: publishing the results of `steps` calls of `step.noisy_sum` with this plan is (epsilon, plan.delta)-DP
    under add-or-remove-one unit, for the `epsilon` of the returned bounds.
    """
    if not plan.private:
        raise InputError("eps=inf: a run without privacy has no epsilon")
    return bounds(plan.sample_rate, plan.noise_multiplier / plan.sensitivity, steps, plan.delta)


def epsilon_of_delta(plan: PrivacyPlan, steps: int) -> list[tuple[float, float]]:
    """(delta, epsilon) by PLD after `steps` ledger entries, delta ascending from 1e-10 to 10 times the plan's.

    The plan's own delta is among them. Of a mechanism without noise there is no curve (InputError).

    Guarantee: the steps are (epsilon, delta)-DP at every point, at all of them at once: the curve depends on public
    numbers alone. At the plan's delta its epsilon is at most that of `spent`, which is what is stated.
    """
    if not plan.private:
        raise InputError("eps=inf: a run without privacy has no epsilon")
    highest = min(10 * plan.delta, 0.1)
    ratio = (highest / LOWEST_DELTA) ** (1 / (DELTA_POINTS - 1))
    deltas = sorted({*(LOWEST_DELTA * ratio**point for point in range(DELTA_POINTS)), plan.delta})
    composed = _composed_pld(plan.sample_rate, plan.noise_multiplier / plan.sensitivity, steps, True)
    return [(delta, float(composed.get_epsilon_for_delta(delta))) for delta in deltas]


def _noise_multiplier_by_pld(eps: float, delta: float, sample_rate: float, steps: int, start: float) -> float:
    """A noise multiplier within about 1e-4 (relative) of the one whose PLD bound is `eps`; searched from `start`."""
    from scipy.optimize import brentq

    @functools.lru_cache
    def excess(log_sigma: float) -> float:
        return pld_epsilon(sample_rate, math.exp(log_sigma), steps, delta) - eps

    low = high = math.log(start)
    width = 0.02
    while excess(high) > 0:
        low, high, width = high, high + width, 2 * width
        if high > math.log(1e5):
            raise InputError(f"eps={eps}: no noise_multiplier below 1e5 reaches it in {steps} steps; raise eps")
    while excess(low) < 0:
        low, high, width = low - width, low, 2 * width
    return math.exp(brentq(excess, low, high, xtol=1e-4) if low < high else high)


@functools.lru_cache(maxsize=256)
def noise_multiplier_for(eps: float, delta: float, sample_rate: float, steps: int) -> float:
    """A noise multiplier whose printed epsilon after `steps` steps is at most `eps`, and close to it.

    PLD is quick, PRV is slow and a little larger: PLD is solved for a target that is lowered by what the printed bound
    was seen to exceed it.

    Guarantee: `bounds(sample_rate, result, steps, delta).epsilon <= eps`.
    """
    aim, sigma = eps, 1.0
    while True:
        sigma = _noise_multiplier_by_pld(aim, delta, sample_rate, steps, sigma)
        excess = bounds(sample_rate, sigma, steps, delta).epsilon - eps
        if excess <= 0:
            return sigma
        aim -= 1.02 * excess + 1e-4 * eps
        if aim <= 0:
            raise InputError(f"eps={eps}: below what the accountants resolve (0.01); raise eps")


def steps_for(epochs: float, sample_rate: float) -> int:
    """Steps in which a unit is drawn `epochs` times on average: ceil(epochs / q), safe against rounding of q.

    Guarantee: a function of public numbers; the accountant counts what it gives, whatever was wished for.
    """
    return max(1, math.ceil(round(epochs / sample_rate, 9)))


def check_public_numbers(eps: float, delta: float, n_public: int, batch_size: int) -> None:
    """Raise InputError outside the ranges that `calibrate` names.

    Guarantee: every number is public, so a refusal tells nothing of the data.
    """
    if math.isnan(eps) or eps <= 0:
        raise InputError(f"eps={eps}: must be above 0, or inf for no privacy")
    if not LOWEST_DELTA <= delta < 1 / n_public:
        raise InputError(
            f"delta={delta}: must be at least {LOWEST_DELTA:g} and below 1/n_public ({1 / n_public:.2g}): below that "
            "the accountants are not sound"
        )
    if not 0 < batch_size <= n_public:
        raise InputError(f"batch_size={batch_size}: must be in [1, n_public={n_public}]")


def calibrate(
    *,
    eps: float,
    delta: float,
    n_public: int,
    batch_size: int,
    epochs: float,
    max_grad_norm: float,
    k: int,
    unit: str,
) -> PrivacyPlan:
    """Make the plan of a private fine-tuning from public numbers alone.

    eps: target, above 0; inf turns clipping and noise off. delta: in (0, 1 / n_public). n_public: nominal number of
    units. batch_size: expected units per step, at most n_public. Raises InputError outside these ranges.

    Guarantee: taking at most `plan.steps` steps of `step.noisy_sum` with this plan, and publishing all their results,
    is (eps, delta)-DP under add-or-remove-one unit.
    """
    check_public_numbers(eps, delta, n_public, batch_size)
    sample_rate = batch_size / n_public
    steps = steps_for(epochs, sample_rate)
    private = eps != math.inf
    return PrivacyPlan(
        sample_rate=sample_rate,
        # for what a unit moves the sum by, rounding included: plan.sensitivity
        noise_multiplier=noise_multiplier_for(eps, delta, sample_rate, steps) * (1 + ROUNDING) if private else 0.0,
        max_grad_norm=max_grad_norm if private else math.inf,
        steps=steps,
        expected_batch=float(batch_size),
        delta=delta,
        target_epsilon=eps,
        k=k,
        unit=unit,
    )
