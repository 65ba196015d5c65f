"""How many rows of the private step are computed at a time: what fits, found on dummy data.

The choice rests on public numbers (shapes, expected batch, k) and on the device; no private picture is looked at. It
cuts the same rows of a step into other micro-batches, so it changes the sum by rounding alone.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from dp_lora.config.schema import Config
from dp_lora.errors import InputError
from dp_lora.events import Events
from dp_lora.models.device import full_precision
from dp_lora.models.folder import Model
from dp_lora.privacy.gradients import micro_batches
from dp_lora.privacy.randomness import ItemStreams
from dp_lora.privacy.sums import sum_over_units
from dp_lora.training.private_loss import diffusion_loss
from dp_lora.training.run_folder import RunFolder

ROWS_ON_A_CPU = 8  # where too many end in a kill, not in an error that can be met
MEMORY_SHARE = 0.95  # of the GPU's memory that the search may take: the rest is room for fragments


def largest_that_fits(fits: Callable[[int], bool], at_most: int) -> int:
    """The largest number in [1, at_most] for which `fits` holds, 0 where not even 1 does; `fits` must be monotone.

    Doubling, then bisection: about 2 * log2(result) calls.
    """
    fitting, tried = 0, 1
    while fits(tried):
        fitting = tried
        if tried == at_most:
            return fitting
        tried = min(2 * tried, at_most)
    while tried - fitting > 1:
        middle = (fitting + tried) // 2
        if fits(middle):
            fitting = middle
        else:
            tried = middle
    return fitting


def physical_batch_size(
    config: Config, model: Model, parameters: Mapping[str, Tensor], run: RunFolder, device: torch.device, events: Events
) -> int:
    """Rows at a time: compute.physical_batch_size; where that is null, what `run` holds, else chosen and kept there.

    InputError where not one fits.
    """
    if config.compute.physical_batch_size is None and run.physical_batch_size is not None:
        return run.physical_batch_size
    at_most = math.ceil(run.plan.expected_batch) * run.plan.k
    rows = rows_at_a_time(config, model, parameters, device, at_most)
    if device.type == "cuda":
        events.message(f"compute.physical_batch_size: {rows} rows at a time, the most that fit; found on dummy data")
        run.keep_physical_batch_size(rows)
    return rows


def rows_at_a_time(
    config: Config, model: Model, parameters: Mapping[str, Tensor], device: torch.device, at_most: int
) -> int:
    """compute.physical_batch_size; where that is null, ROWS_ON_A_CPU, or on a GPU as many as fit, up to `at_most`.

    InputError where not one does.
    """
    if config.compute.physical_batch_size is not None:
        return config.compute.physical_batch_size
    if device.type != "cuda":
        return ROWS_ON_A_CPU
    with _part_of_the_memory(device):
        rows = largest_that_fits(lambda size: fits(config, model, parameters, device, size), at_most)
    if rows == 0:
        raise InputError(
            "compute.physical_batch_size=null: not one row fits in the GPU's memory; free it, or use another"
        )
    return rows


def fits(config: Config, model: Model, parameters: Mapping[str, Tensor], device: torch.device, size: int) -> bool:
    """True where `dummy_sum` stays within the memory of `device`."""
    torch.cuda.empty_cache()
    try:
        dummy_sum(config, model, parameters, device, size)
    except torch.OutOfMemoryError:
        return False
    return True


def dummy_sum(
    config: Config, model: Model, parameters: Mapping[str, Tensor], device: torch.device, size: int
) -> Tensor:
    """Norms, on the CPU, of a sum over dummy pictures: two micro-batches of `size` rows.

    The costliest case: nearly every row is a unit of its own, the rows are uneven, so that each takes a copy of its
    unit's weights, and a micro-batch follows another.
    """
    side = model.unet.config["sample_size"]
    latents = np.zeros((1, model.unet.config["in_channels"], side, side), np.float32)
    loss = diffusion_loss(config, model, latents, np.zeros(1, np.int64), device)(ItemStreams(0))
    units = [[0, 0], *[[0]] * (size - 2)] if size > 1 else [[0]]
    with full_precision():
        _, norms, _ = sum_over_units(loss, parameters, micro_batches(2 * units, 1, size, device), 1.0)
    return norms.cpu()


@contextmanager
def _part_of_the_memory(device: torch.device) -> Iterator[None]:
    before = torch.cuda.get_per_process_memory_fraction(device.index)
    torch.cuda.set_per_process_memory_fraction(before * MEMORY_SHARE, device.index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device.index)
        torch.cuda.empty_cache()
