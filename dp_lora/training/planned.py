"""What a dry run says before any work is done: the plan's numbers, epsilon, parameters, and what the work costs."""

from typing import Any

from dp_lora.models.counting import count_parameters
from dp_lora.models.estimate import count_flops, estimate_lines, finetuning_work, sampling_work
from dp_lora.privacy.accounting import spent
from dp_lora.privacy.composition import ReleaseCost, compose, together
from dp_lora.privacy.published import claimed_epsilon
from dp_lora.training.costs import rates_at_hand
from dp_lora.training.resolved import Resolved


def finetuning_facts(start: Resolved, *, samples: bool = False) -> dict[str, Any]:
    """The numbers of a fine-tuning, from public ones alone; with `samples` the cost of drawing these too."""
    config, plan, base = start.config, start.plan, start.base
    facts: dict[str, Any] = {
        "noise_multiplier": plan.noise_multiplier,
        "sample_rate": plan.sample_rate,
        "steps": plan.steps,
    }
    if plan.guaranteed:
        own = spent(plan, plan.steps).epsilon
        facts["expected epsilon"] = own
        if before := together(start.spent_by_base(), start.parent):
            total, delta = compose([*before, ReleaseCost(own, plan.delta)])
            facts["expected epsilon, with what was spent before"] = f"{total:.6g} at delta {delta:.6g}"
    elif plan.private:
        facts["epsilon claimed by the released code"] = claimed_epsilon(plan, plan.steps)
        facts["epsilon bounded by the noise"] = spent(plan, plan.steps).epsilon
    facts["trainable parameters"] = count_parameters(config, base)["trainable"]
    row, rates = count_flops(config, base), rates_at_hand(config, base)
    parts = finetuning_work(config, row, plan.steps, plan.expected_batch, rates)
    return facts | estimate_lines([*parts, *(sampling_work(config, row, rates) if samples else [])], rates)
