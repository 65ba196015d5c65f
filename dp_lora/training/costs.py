"""Cost of work on this machine, for a dry run: by rates measured on its GPU, else by its processor's speed."""

import functools
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dp_lora.config.schema import Config
from dp_lora.models.driver import driver_is_there
from dp_lora.models.estimate import (
    Processor,
    Rates,
    Work,
    count_flops,
    estimate_lines,
    processor_basis,
    sampling_work,
    time_text,
)
from dp_lora.models.pipeline_index import is_outline
from dp_lora.models.shapes import base_shapes

PRODUCT_SIDE, PRODUCTS = 1024, 6  # matrix products that measure a processor: 2 GFLOP each


def sampling_facts(config: Config, base: Path) -> dict[str, str]:
    """Cost of drawing the samples."""
    rates, shapes = rates_at_hand(config, base), base_shapes(config, base)
    row = count_flops(config, base, shapes)
    return cost_lines(config, sampling_work(config, row, rates, shapes.family), rates)


def cost_lines(config: Config, parts: Sequence[Work], rates: Rates | None) -> dict[str, str]:
    """The lines of `estimate_lines`, after one for this machine's own processor where that would do the work."""
    lines: dict[str, str] = {}
    if (processor := processor_at_hand(config)) is not None:
        took = time_text(sum(part.seconds_on(processor) for part in parts))
        lines["estimated here"] = f"{took} on {processor_basis(processor)}"
    return lines | estimate_lines(parts, rates)


def processor_at_hand(config: Config) -> Processor | None:
    """This machine's processor; None where a GPU would do the work."""
    if config.compute.device != "cpu" and driver_is_there():
        return None
    return measured_processor()


@functools.cache
def measured_processor() -> Processor:
    """This machine's processor, measured once in a process, in a fraction of a second."""
    factor = np.ones((PRODUCT_SIDE, PRODUCT_SIDE), np.float32)
    seconds = []
    for _ in range(PRODUCTS):
        start = time.perf_counter()
        factor @ factor
        seconds.append(time.perf_counter() - start)
    # the quickest: a product that shared the cores with another program does not show their speed
    return Processor(len(os.sched_getaffinity(0)), 2 * PRODUCT_SIDE**3 / min(seconds))


def rates_at_hand(config: Config, base: Path) -> Rates | None:
    """Measured rates of the work here, where there are a GPU and the base model; None elsewhere."""
    if config.compute.device == "cpu" or not base.exists() or is_outline(base) or not driver_is_there():
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    from dp_lora.models.adapters import ready_to_draw
    from dp_lora.models.device import pick_precision
    from dp_lora.models.folder import load_model
    from dp_lora.training.measure import measure_rates  # trains and draws: a dry run without a GPU does neither

    device = torch.device("cuda")
    precision = pick_precision(config.compute.precision, device)
    model = ready_to_draw(load_model(base, device, precision), config)
    return measure_rates(config, model, config.privacy.batch_size * config.privacy.k, device)
