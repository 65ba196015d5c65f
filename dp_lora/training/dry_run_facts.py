"""Facts that a dry run prints before any work is done: the plan's numbers, epsilon, parameters, cost of the work."""

import math
from typing import Any

from dp_lora.config.schema import Config
from dp_lora.models.counting import count_parameters
from dp_lora.models.estimate import count_flops, finetuning_work, sampling_work
from dp_lora.privacy.accounting import spent
from dp_lora.privacy.audit_bound import ceiling
from dp_lora.privacy.audit_scores import SCORES
from dp_lora.privacy.composition import ReleaseCost, compose, together
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.privacy.published import claimed_at, claimed_epsilon
from dp_lora.training.costs import cost_lines, rates_at_hand
from dp_lora.training.resolved import Resolved

HIGH_NOISE_RATIO = 1.2  # up to about here the default experiment still learns (eps=1: 1.19)


def _shown_ratio(ratio: float) -> str:
    """The noise's norm over the clip, after averaging: whether there is anything to learn; a public number."""
    if ratio <= HIGH_NOISE_RATIO:
        return f"{ratio:.2f}"
    return (
        f"{ratio:.2f}, above {HIGH_NOISE_RATIO:g}: the noise will hide most of what is learnt; more pictures, a larger "
        "batch, a larger eps, lora.train=B, a lower rank or fewer lora.targets lower it"
    )


def finetuning_facts(start: Resolved, *, samples: bool = False) -> dict[str, Any]:
    """The numbers of a fine-tuning, from public numbers alone; with `samples` also the cost of drawing samples."""
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
    counts = count_parameters(config, start.shapes)
    facts["trainable parameters"] = counts["trainable"]
    if plan.private:
        norm = plan.noise_multiplier * math.sqrt(counts["trainable"])
        facts["noise ratio"] = _shown_ratio(norm / plan.expected_batch)
    row, rates = count_flops(config, base, start.shapes), rates_at_hand(config, base)
    family = start.shapes.family
    if family.pipeline:
        from dp_lora.models.memory import memory_line  # torch and diffusers, which the operations loaded already

        facts["memory"] = memory_line(config, base, start.shapes)
    parts = finetuning_work(config, row, plan.steps, plan.expected_batch, rates, family)
    parts += sampling_work(config, row, rates, family) if samples else []
    return facts | cost_lines(config, parts, rates)


def audit_facts(config: Config, plan: PrivacyPlan) -> dict[str, Any]:
    """The numbers of an audit of `plan`, from public numbers alone. InputError for a plan without privacy."""
    delta = config.audit.delta or plan.delta
    found = {"noise_multiplier": plan.noise_multiplier, "sample_rate": plan.sample_rate, "steps": plan.steps}
    highest = ceiling(config.audit.canaries, delta, SCORES)
    return found | {
        "epsilon claimed": claimed_at(plan, delta),
        "epsilon that perfect guesses would show": f"{highest:.3f} at 95% confidence",
    }
