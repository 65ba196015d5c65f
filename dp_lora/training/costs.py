"""What work costs on this machine, for a dry run: measured where there is a GPU, else left to `models/estimate.py`."""

import ctypes
from pathlib import Path

from dp_lora.config.schema import Config
from dp_lora.models.estimate import Rates, count_flops, estimate_lines, sampling_work
from dp_lora.models.shapes import base_shapes

DRIVER = "libcuda.so.1"  # of NVIDIA; without it torch, which takes seconds to import, sees no GPU


def sampling_facts(config: Config, base: Path) -> dict[str, str]:
    """What drawing the samples costs."""
    rates, shapes = rates_at_hand(config, base), base_shapes(config, base)
    row = count_flops(config, base, shapes)
    return estimate_lines(sampling_work(config, row, rates, shapes.family), rates)


def rates_at_hand(config: Config, base: Path) -> Rates | None:
    """What the work takes here, measured, where there are a GPU and the base model; None elsewhere."""
    if config.compute.device == "cpu" or not base.exists() or not _driver_is_there():
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


def _driver_is_there() -> bool:
    try:
        ctypes.CDLL(DRIVER)
    except OSError:
        return False
    return True
