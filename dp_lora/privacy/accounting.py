"""Epsilon of a plan after some steps, and the noise that a target epsilon needs.

The mechanism is the Poisson-subsampled Gaussian with sensitivity 1 and noise sigma under add-or-remove-one, composed
over the steps. One number is printed, and the noise is calibrated to it: the upper bound of its privacy loss
distribution (PLD: `loss_distribution`). Two accountants by other authors, with other methods and code, stand beside it:
Opacus' PRV (Gopi et al. 2021), whose lower bound must not exceed it, and Opacus' RDP (Mironov 2017), which is looser.
"""

import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from dp_lora.errors import InputError
from dp_lora.privacy.loss_distribution import epsilon_bound_of_all
from dp_lora.privacy.opacus_accountants import accountants
from dp_lora.privacy.plan import FLAT, ROUNDING, PrivacyPlan

LOWEST_DELTA = 1e-10
LOWEST_EPSILON = 1e-3  # of a target: below it, the rounding of 10^6 steps nears the grid's own overestimate
LOWEST_NOISE, HIGHEST_NOISE, MOST_STEPS = 1e-3, 1e9, 10**7
CLOSE = 0.9993, 0.9999  # share of the target at which the search for noise ends
PRV_GRID_LIMIT = 1_000_000  # points; the accountant takes about 250 bytes for each
PRV_ERROR = 0.02  # error of the cross-check, as a share of epsilon
# Renyi orders: 89 of Opacus' own orders are fractions, which take up to 0.1 s each, and its orders end at 63
ORDERS = (1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, *range(4, 64), 128, 256, 512, 1000)
DELTA_POINTS = 12  # of the curve of epsilon over delta


@dataclass(frozen=True)
class Spent:
    """Cost of some steps: they are (epsilon, delta)-differentially private."""

    epsilon: float
    delta: float


@dataclass(frozen=True)
class Accountants:
    """`epsilon`, PLD's upper bound, is printed; PRV's two bounds are None where `prv_bounds` gives none."""

    epsilon: float
    prv_lower: float | None
    prv: float | None
    rdp: float

    def as_json(self) -> dict[str, float | None]:
        return asdict(self)


@functools.lru_cache(maxsize=256)
def pld_epsilon(sample_rate: float, noise_multiplier: float, steps: int, delta: float) -> float:
    """Epsilon after `steps` steps, as it is printed; inf where no finite one holds.

    Guarantee: the composition of `steps` Poisson-subsampled Gaussian mechanisms (rate `sample_rate` in (0, 1], noise
    standard deviation `noise_multiplier` > 0 times the sensitivity) is (result, delta)-DP under add-or-remove-one.
    Raises InputError outside these ranges.
    """
    return pld_epsilon_of_all(((sample_rate, noise_multiplier, steps),), delta)


@functools.lru_cache(maxsize=256)
def pld_epsilon_of_all(kinds: tuple[tuple[float, float, int], ...], delta: float) -> float:
    """Epsilon of several kinds of steps on the same data together; inf where no finite one holds.

    `kinds`: sample rate, noise multiplier and number of steps of each kind. One kind alone gives `pld_epsilon`.

    Guarantee: that of `pld_epsilon`, for the composition of all steps of all kinds. Raises InputError outside its
    ranges; the range of steps limits the sum over all kinds.
    """
    for sample_rate, noise_multiplier, _ in kinds:
        if not 0 < sample_rate <= 1:
            raise InputError(f"sample_rate={sample_rate}: must be in (0, 1]")
        if not LOWEST_NOISE <= noise_multiplier <= HIGHEST_NOISE:
            raise InputError(
                f"noise_multiplier={noise_multiplier}: must be from {LOWEST_NOISE:g} to {HIGHEST_NOISE:g} times what "
                "one unit moves the sum by: no bound was tried beyond"
            )
    if not LOWEST_DELTA <= delta < 1:
        raise InputError(f"delta={delta}: must be in [{LOWEST_DELTA:g}, 1)")
    numbers = [steps for *_, steps in kinds]
    if min(numbers, default=0) < 0 or sum(numbers) > MOST_STEPS:
        raise InputError(f"steps={sum(numbers)}: must be from 0 to {MOST_STEPS:,}: rounding adds up beyond")
    taken = [kind for kind in kinds if kind[2]]
    return epsilon_bound_of_all(taken, delta) if taken else 0.0


@functools.lru_cache(maxsize=256)
def rdp_epsilon(sample_rate: float, noise_multiplier: float, steps: int, delta: float) -> float:
    """Epsilon by Opacus' RDP accountant: looser than the others.

    Guarantee: that of `pld_epsilon`, by this accountant alone.
    """
    accountant = accountants()[0].RDPAccountant()
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 'optimal order is the largest alpha': the bound holds all the same
        return float(accountant.get_epsilon(delta, alphas=ORDERS))


def prv_grid_points(
    sample_rate: float, noise_multiplier: float, steps: int, delta: float, eps_error: float = 0.01
) -> float:
    """Points of the grid that Opacus' PRV accountant would make: 2 L / mesh, by its rule (Gopi et al., remark 5.6).

    Guarantee: none is needed: it only decides whether PRV is asked; PLD's bound holds without PRV.
    """
    delta_error = delta / 1000
    mesh = eps_error / math.sqrt(steps * math.log(12 / delta_error) / 2)
    domain = max(
        rdp_epsilon(sample_rate, noise_multiplier, steps, delta_error / 4),
        rdp_epsilon(sample_rate, noise_multiplier, 1, delta_error / (8 * steps)),
        eps_error,
    )
    return 2 * (domain + 3) / mesh


@functools.lru_cache(maxsize=64)
def prv_bounds(
    sample_rate: float, noise_multiplier: float, steps: int, delta: float, eps_error: float = 0.01
) -> tuple[float, float] | None:
    """Lower and upper bound on epsilon by Opacus' PRV accountant, about 2 `eps_error` apart (its default: 0.01).

    None where its grid would be too large, or its rounding (about steps * 2^-52) passes its own delta / 1000, or it has
    no answer.

    Guarantee: the upper bound has that of `pld_epsilon`, by this accountant alone.
    """
    delta_error = delta / 1000
    if steps * 2.0**-52 > delta_error:
        return None
    if not prv_grid_points(sample_rate, noise_multiplier, steps, delta, eps_error) <= PRV_GRID_LIMIT:
        return None
    accountant = accountants()[0].PRVAccountant()
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            composed = accountant._get_dprv(eps_error=eps_error, delta_error=delta_error)
            lower, _, upper = composed.compute_epsilon(delta, delta_error, eps_error)
        except (RuntimeError, ValueError):
            return None
    return (float(lower), float(upper)) if math.isfinite(lower) and math.isfinite(upper) else None


def spent(plan: PrivacyPlan, steps: int) -> Spent:
    """Cost of `steps` ledger entries of a plan: a function of these two alone.

    The noise counts relative to the most that one unit really moves the sum: plan.sensitivity times max_grad_norm.
    InputError for a plan without privacy.

    Guarantee: publishing the results of `steps` calls of `step.noisy_sum` with this plan is (epsilon, plan.delta)-DP
    under add-or-remove-one unit, for the `epsilon` of the result.
    """
    return Spent(pld_epsilon(plan.sample_rate, _noise(plan), steps, plan.delta), plan.delta)


def spent_by_all(plans: Sequence[PrivacyPlan], delta: float) -> Spent:
    """Cost of all steps of several plans on the same data together, at `delta`; (0, delta) for none.

    InputError for a plan without privacy. The caller must see to it that all plans have one unit and one relation.

    Guarantee: publishing the results of all steps of all plans is (epsilon, delta)-DP under add-or-remove-one unit.
    """
    kinds: dict[tuple[float, float], int] = {}
    for plan in plans:
        key = (plan.sample_rate, _noise(plan))
        kinds[key] = kinds.get(key, 0) + plan.steps
    return Spent(pld_epsilon_of_all(tuple((*key, steps) for key, steps in sorted(kinds.items())), delta), delta)


def cross_checked(plan: PrivacyPlan, steps: int) -> Accountants:
    """The printed epsilon after `steps` steps, 1 or more, beside those of the independent accountants.

    Guarantee: where PRV was asked, its lower bound does not exceed the epsilon of `spent`. InputError where it does:
    one of the two is wrong, so no plan is made and nothing is released.
    """
    public = (plan.sample_rate, _noise(plan), steps, plan.delta)
    printed = spent(plan, steps).epsilon
    # the theorem behind PRV needs an error well below 1
    lower, upper = prv_bounds(*public, min(PRV_ERROR * printed, 0.5)) or (None, None) if printed > 0 else (None, None)
    if lower is not None and lower > printed:
        raise InputError(
            f"epsilon {printed:.6g} after {steps} steps (PLD) is below the lower bound {lower:.6g} of Opacus' PRV "
            "accountant: one of them is wrong, so nothing is released; check the installed versions of opacus and scipy"
        )
    return Accountants(epsilon=printed, prv_lower=lower, prv=upper, rdp=rdp_epsilon(*public))


def _noise(plan: PrivacyPlan) -> float:
    if not plan.private:
        raise InputError("eps=inf: a run without privacy has no epsilon")
    return plan.noise_multiplier / plan.sensitivity


def epsilon_of_delta(plan: PrivacyPlan, steps: int) -> list[tuple[float, float]]:
    """(delta, epsilon) after `steps` ledger entries, delta ascending from 1e-10 to 10 times the plan's.

    The plan's own delta is among them. InputError for a mechanism without noise: it has no curve.

    Guarantee: the steps are (epsilon, delta)-DP at every point, at all of them at once: the curve depends on public
    numbers alone. At the plan's delta its epsilon is that of `spent`, the stated one.
    """
    noise = _noise(plan)
    highest = min(10 * plan.delta, 0.1)
    ratio = (highest / LOWEST_DELTA) ** (1 / (DELTA_POINTS - 1))
    deltas = sorted({*(LOWEST_DELTA * ratio**point for point in range(DELTA_POINTS)), plan.delta})
    return [(delta, pld_epsilon(plan.sample_rate, noise, steps, delta)) for delta in deltas]


@functools.lru_cache(maxsize=256)
def noise_multiplier_for(eps: float, delta: float, sample_rate: float, steps: int) -> float:
    """A noise multiplier whose printed epsilon after `steps` steps is at most `eps`, and close to it.

    Guarantee: `pld_epsilon(sample_rate, result, steps, delta) <= eps`. InputError where none between 1e-3 and 1e9
    reaches 0.995 of `eps`.
    """
    from scipy.optimize import brentq

    reached: dict[float, float] = {}  # epsilon by log of the noise, where it is within the target

    def excess(log_sigma: float) -> float:
        found = pld_epsilon(sample_rate, math.exp(log_sigma), steps, delta)
        if found <= CLOSE[1] * eps:
            reached[log_sigma] = found
        if CLOSE[0] * eps <= found <= CLOSE[1] * eps:
            return 0.0
        # bounded, as epsilon may be 0 or inf
        return math.log((min(found, 1e6 * eps) + 1e-3 * eps) / ((sum(CLOSE) / 2 + 1e-3) * eps))

    lowest, highest = math.log(LOWEST_NOISE * 1.01), math.log(HIGHEST_NOISE / 1.01)
    guess = math.log(sample_rate * math.sqrt(-2 * steps * math.log(delta)) / eps + 0.1)
    low = high = min(max(guess, lowest), highest)
    while (over := excess(high)) > 0 and high < highest:
        low, high = high, min(high + min(max(over, 0.05), 2.0), highest)
    while (over := excess(low)) < 0 and low > lowest:
        low, high = max(low + max(min(over, -0.05), -2.0), lowest), low
    if excess(low) > 0 > excess(high):
        brentq(excess, low, high, xtol=1e-6)
    least = min(reached, default=math.inf)
    if reached.get(least, 0.0) < 0.995 * eps:
        raise InputError(
            f"eps={eps}: no noise_multiplier gives it in {steps} steps at delta={delta}; change eps or delta"
        )
    return math.exp(least)


def steps_for(epochs: float, sample_rate: float) -> int:
    """Steps in which a unit is drawn `epochs` times on average: ceil(epochs / q), safe against rounding of q.

    Guarantee: a function of public numbers; the accountant counts these steps, whatever `epochs` asked for.
    """
    return max(1, math.ceil(round(epochs / sample_rate, 9)))


def check_public_numbers(eps: float, delta: float, n_public: int, batch_size: int) -> None:
    """Raise InputError outside the ranges that `calibrate` names.

    Guarantee: every number is public, so a refusal tells nothing of the data.
    """
    if math.isnan(eps) or eps <= 0:
        raise InputError(f"eps={eps}: must be above 0, or inf for no privacy")
    if eps < LOWEST_EPSILON:
        raise InputError(
            f"eps={eps}: must be at least {LOWEST_EPSILON}: the accountants resolve no smaller one; raise eps"
        )
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
    clipping: str = FLAT,
) -> PrivacyPlan:
    """Make the plan of a private fine-tuning from public numbers alone.

    eps: target, at least 1e-3; inf turns clipping and noise off. delta: in [1e-10, 1 / n_public). n_public: nominal
    number of units. batch_size: expected units per step, at most n_public. clipping: flat or automatic; epsilon is the
    same (clipping.py). Raises InputError outside these ranges, and where the accountants contradict each other
    (`cross_checked`).

    Guarantee: taking at most `plan.steps` steps of `step.noisy_sum` with this plan, and publishing all their results,
    is (eps, delta)-DP under add-or-remove-one unit.
    """
    check_public_numbers(eps, delta, n_public, batch_size)
    sample_rate = batch_size / n_public
    steps = steps_for(epochs, sample_rate)
    private = eps != math.inf
    plan = PrivacyPlan(
        sample_rate=sample_rate,
        # scaled to the most that a unit moves the sum, rounding included: plan.sensitivity
        noise_multiplier=noise_multiplier_for(eps, delta, sample_rate, steps) * (1 + ROUNDING) if private else 0.0,
        max_grad_norm=max_grad_norm if private else math.inf,
        steps=steps,
        expected_batch=float(batch_size),
        delta=delta,
        target_epsilon=eps,
        k=k,
        unit=unit,
        clipping=clipping,
    )
    if private:
        cross_checked(plan, steps)
    return plan
