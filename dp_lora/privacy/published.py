"""The accounting of the code released with the paper, for comparison alone.

That code clips each of the k noise draws apart and sets the noise for one of them. Its claim is printed beside the
epsilon of `accounting.spent`, which counts all k draws of a unit.
"""

import functools
import math
import warnings
from dataclasses import replace

from dp_lora.errors import InputError
from dp_lora.privacy.accounting import check_public_numbers, prv_bounds, spent, steps_for
from dp_lora.privacy.opacus_accountants import accountants
from dp_lora.privacy.plan import PUBLISHED, PrivacyPlan


def published_plan(
    *, eps: float, delta: float, n_public: int, batch_size: int, epochs: float, max_grad_norm: float, k: int, unit: str
) -> PrivacyPlan:
    """The plan as the released code makes it through Opacus: rate 1 / len(loader), noise by Opacus' PRV for one draw.

    len(loader) = ceil(n_public / batch_size); the divisor is floor(n_public * rate). Arguments and ranges as in
    `accounting.calibrate`; eps must be finite, unit a picture (InputError).

    Guarantee: none at `eps`. The epsilon of `accounting.spent` holds, with sensitivity k times max_grad_norm.
    """
    check_public_numbers(eps, delta, n_public, batch_size)
    batches = math.ceil(n_public / batch_size)
    steps = steps_for(epochs, 1 / batches)
    return PrivacyPlan(
        sample_rate=1 / batches,
        noise_multiplier=_noise_multiplier(eps, delta, 1 / batches, steps) if eps != math.inf else 0.0,
        max_grad_norm=max_grad_norm,
        steps=steps,
        expected_batch=float(n_public // batches),
        delta=delta,
        target_epsilon=eps,
        k=k,
        unit=unit,
        accounting=PUBLISHED,
    )


@functools.lru_cache(maxsize=64)
def _noise_multiplier(eps: float, delta: float, sample_rate: float, steps: int) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 'optimal order is the largest alpha', of the RDP bound that sizes PRV's grid
        try:
            return accountants()[1].get_noise_multiplier(
                target_epsilon=eps, target_delta=delta, sample_rate=sample_rate, steps=steps, accountant="prv"
            )
        except (RuntimeError, ValueError) as error:
            raise InputError(f"eps={eps}: Opacus' PRV accountant finds no noise for it ({error}); raise eps") from None


def claimed_epsilon(plan: PrivacyPlan, steps: int) -> float:
    """The epsilon that the released code prints after `steps` steps: PRV's, as if a unit added only one draw.

    Guarantee: none.
    """
    if not steps:
        return 0.0
    claimed = prv_bounds(plan.sample_rate, plan.noise_multiplier, steps, plan.delta)
    if claimed is None:
        raise InputError(f"privacy.accounting={PUBLISHED}: Opacus' PRV accountant has no answer after {steps} steps")
    return claimed[1]


def claimed_at(plan: PrivacyPlan, delta: float) -> float:
    """Claimed epsilon of all the plan's steps at `delta`: a bound, or the number that the released code prints.

    InputError for a plan without privacy, which claims nothing.

    Guarantee: where plan.guaranteed that of `accounting.spent`; else none.
    """
    if not plan.private:
        raise InputError("eps=inf: a run without privacy claims nothing that an audit could refute; set a finite eps")
    at = replace(plan, delta=delta)
    return spent(at, at.steps).epsilon if plan.guaranteed else claimed_epsilon(at, at.steps)
