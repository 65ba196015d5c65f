"""What a dry run says before any work is done: the plan's numbers, epsilon, parameters, and what the work costs."""

from pathlib import Path
from typing import Any

import torch

from dp_lora.config.schema import Config
from dp_lora.models.counting import count_parameters
from dp_lora.models.estimate import Rates, count_flops, estimate_lines, finetuning_work, sampling_work
from dp_lora.models.folder import load_model
from dp_lora.privacy.accounting import spent
from dp_lora.privacy.composition import Part, compose, together
from dp_lora.privacy.published import claimed_epsilon
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
            total, delta = compose([*before, Part(own, plan.delta)])
            facts["expected epsilon, with what was spent before"] = f"{total:.6g} at delta {delta:.6g}"
    elif plan.private:
        facts["epsilon claimed by the released code"] = claimed_epsilon(plan, plan.steps)
        facts["epsilon bounded by the noise"] = spent(plan, plan.steps).epsilon
    facts["trainable parameters"] = count_parameters(config, base)["trainable"]
    row, rates = count_flops(config, base), rates_at_hand(config, base)
    parts = finetuning_work(config, row, plan.steps, plan.expected_batch, rates)
    return facts | estimate_lines([*parts, *(sampling_work(config, row, rates) if samples else [])], rates)


def sampling_facts(config: Config, base: Path) -> dict[str, str]:
    """What drawing the samples costs."""
    rates = rates_at_hand(config, base)
    return estimate_lines(sampling_work(config, count_flops(config, base), rates), rates)


def rates_at_hand(config: Config, base: Path) -> Rates | None:
    """What the work takes here, measured, where there are a GPU and the base model; None elsewhere."""
    if config.compute.device == "cpu" or not torch.cuda.is_available() or not base.exists():
        return None
    from dp_lora.training.measure import measure_rates  # trains and draws: a dry run without a GPU does neither

    device = torch.device("cuda")
    return measure_rates(config, load_model(base, device), config.privacy.batch_size * config.privacy.k, device)
