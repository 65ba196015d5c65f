"""Facts that a dry run prints before any work is done: the plan's numbers, epsilon, parameters, cost of the work."""

import math
from collections.abc import Sequence
from typing import Any

from dp_lora.config.prompts import SEPARATOR, drawn_prompts
from dp_lora.config.schema import Config
from dp_lora.models.counting import count_parameters
from dp_lora.models.estimate import count_flops, finetuning_work, flops_text, sampling_work
from dp_lora.models.families import Family
from dp_lora.models.memory import memory_line
from dp_lora.models.pipeline_index import is_pipeline
from dp_lora.privacy.accounting import spent
from dp_lora.privacy.audit_bound import ceiling
from dp_lora.privacy.audit_scores import SCORES
from dp_lora.privacy.composition import ReleaseCost, compose, together
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.privacy.published import claimed_at, claimed_epsilon
from dp_lora.training.costs import cost_lines, rates_at_hand
from dp_lora.training.resolved import Resolved

MOST_PROMPTS = 4  # most prompts that are shown
FEW_PICTURES = 1000  # units of data.n_public below which training at a useful epsilon is hopeless (docs/bases.md)
HIGH_NOISE_RATIO = 1.2  # up to about here the default experiment still learns (eps=1: 1.19)


def _shown_ratio(ratio: float, config: Config) -> str:
    """The noise's norm over the clip, after averaging: whether there is anything to learn; a public number."""
    if ratio <= HIGH_NOISE_RATIO:
        return f"{ratio:.2f}"
    lower = ["more pictures", "a larger batch", "a larger eps", "fewer lora.targets"]
    lower += ["lora.train=B"] if config.lora.train != "B" else []
    lower += ["a lower rank"] if config.lora.rank > 1 else []
    few = "; with a few hundred pictures no setting helps" if config.data.n_public < FEW_PICTURES else ""
    return (
        f"{ratio:.2f}, above {HIGH_NOISE_RATIO:g}: the noise will hide most of what is learnt; "
        f"{', '.join(lower[:-1])} or {lower[-1]} lower it{few}"
    )


def _shown_family(family: Family) -> str:
    trained = "flow matching" if family.flow else "noise"
    given = "classes" if family.of_classes else f"captions of at most {family.tokens} tokens"
    return f"{family.pipeline}; its {family.part} is adapted, by {trained}, on {given}"


def _shown_prompts(prompts: Sequence[str]) -> str:
    more = f", and {len(prompts) - MOST_PROMPTS} more" if len(prompts) > MOST_PROMPTS else ""
    return f"{f' {SEPARATOR} '.join(prompts[:MOST_PROMPTS])}{more}"


def finetuning_facts(start: Resolved, *, samples: bool = False) -> dict[str, Any]:
    """The numbers of a fine-tuning, from public numbers alone; with `samples` also the cost of drawing samples.

    Those that decide whether it can work come first.
    """
    config, plan, base, family = start.config, start.plan, start.base, start.shapes.family
    facts: dict[str, Any] = {"base": _shown_family(family)} if family.pipeline else {}
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
    if plan.private:
        norm = plan.noise_multiplier * math.sqrt(counts["trainable"])
        facts["noise ratio"] = _shown_ratio(norm / plan.expected_batch, config)
    facts |= {
        "noise_multiplier": plan.noise_multiplier,
        "sample_rate": plan.sample_rate,
        "steps": plan.steps,
        "trainable parameters": counts["trainable"],
        "adapted layers": len(counts["lora_modules"]),
    }
    row, rates = count_flops(config, base, start.shapes), rates_at_hand(config, base)
    facts["operations a row"] = flops_text(row.train)
    if family.pipeline:
        from dp_lora.models.disk import disk_line  # torch and diffusers, which the operations loaded already

        facts["memory"] = memory_line(config, base, start.shapes)
        if is_pipeline(base):  # a base of ours that is still to be made has no files to count
            facts["disk"] = disk_line(config, base, family)
    if not family.of_classes:
        facts["prompts"] = _shown_prompts(drawn_prompts(config))
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
