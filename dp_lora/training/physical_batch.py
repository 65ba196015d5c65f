"""How many rows of the private step are computed at a time: as many as fit, found on dummy data.

The choice rests on public numbers (shapes, expected batch, k) and on the device; no private picture is read. It cuts
the same rows of a step into other micro-batches, so it changes the sum by rounding alone.
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
from dp_lora.privacy.gradients import micro_batches, rows_at_once, rows_per_part
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.privacy.randomness import ItemStreams
from dp_lora.privacy.sums import LossFactory, sum_over_units
from dp_lora.training.private_loss import diffusion_loss
from dp_lora.training.run_folder import RunFolder
from dp_lora.training.start import dummy_captions

ROWS_ON_A_CPU = 8  # running out of memory on a CPU kills the process; there is no exception to catch
MEMORY_SHARE = 0.95  # share of the GPU's memory that the search may take: the rest is room for fragments


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
    config: Config,
    model: Model,
    parameters: Mapping[str, Tensor],
    run: RunFolder,
    device: torch.device,
    events: Events,
    ranks: int = 1,
) -> int:
    """Rows at a time: compute.physical_batch_size; if null, the number that `run` holds, else chosen and kept there.

    A number in the config that pads more than it must (`evenly`), or is no multiple of the draws per clip, becomes a
    lower one, with a message. InputError where not one row fits.
    """
    plan, configured = run.plan, config.compute.physical_batch_size
    if configured is None and run.physical_batch_size is not None:
        return run.physical_batch_size
    at_most = rows_of_a_step(plan, ranks)
    rows = rows_at_a_time(config, model, parameters, device, plan.draws_per_clip, at_most)
    rows = evenly(at_most, rows, plan.draws_per_clip)
    if configured is not None and rows != configured:
        events.message(
            f"compute.physical_batch_size={configured}: {rows} rows at a time: as few micro-batches, all of one size, "
            f"that a step just fills, of pictures with k={plan.k} draws each that are always cut the same way"
        )
    if configured is None and device.type == "cuda":
        events.message(f"compute.physical_batch_size: {rows} rows at a time, by what fits; found on dummy data")
        run.keep_physical_batch_size(rows)
    return rows


def rows_of_a_step(plan: PrivacyPlan, ranks: int = 1) -> int:
    """Rows of one rank that 97% of the steps do not exceed: mean plus two standard deviations, from public numbers."""
    return math.ceil((plan.expected_batch + 2 * math.sqrt(plan.expected_batch)) / ranks) * plan.k


def evenly(step: int, at_most: int, k: int) -> int:
    """Rows at a time with which `step` rows take as few micro-batches as with `at_most`, and the least padding.

    The last micro-batch is padded to the size of the others: 768 rows of k=12 take four of 192, not four of 252.
    """
    part = rows_per_part(k, at_most)
    micro_batches = math.ceil(step / rows_at_once(k, at_most))
    return math.ceil(step / micro_batches / part) * part


def rows_at_a_time(
    config: Config, model: Model, parameters: Mapping[str, Tensor], device: torch.device, k: int, at_most: int
) -> int:
    """compute.physical_batch_size; if null, ROWS_ON_A_CPU, or on a GPU as many rows as fit, up to `at_most`.

    Rows come in whole parts of the `k` draws that one clip takes (`rows_at_once`). InputError where not one row fits.
    """
    if config.compute.physical_batch_size is not None:
        return rows_at_once(k, min(config.compute.physical_batch_size, at_most))
    if device.type != "cuda":
        return rows_at_once(k, min(ROWS_ON_A_CPU, at_most))
    with _part_of_the_memory(device):
        pictures = largest_that_fits(lambda n: fits(config, model, parameters, device, k, n * k), max(1, at_most // k))
        rows = pictures * k
        if not pictures and k > 1:
            # one picture's draws are too many: the largest share of them that fits
            shares = (rows_per_part(k, size) for size in range(k - 1, 0, -1))
            rows = next((n for n in dict.fromkeys(shares) if fits(config, model, parameters, device, k, n)), 0)
    if rows == 0:
        raise InputError(
            "compute.physical_batch_size=null: not one row fits in the GPU's memory; free it, or use another"
        )
    return rows


def fits(
    config: Config, model: Model, parameters: Mapping[str, Tensor], device: torch.device, k: int, size: int
) -> bool:
    """True where `dummy_sum` stays within the memory of `device`."""
    torch.cuda.empty_cache()
    try:
        dummy_sum(config, model, parameters, device, k, size)
    except torch.OutOfMemoryError:
        return False
    return True


def dummy_loss(config: Config, model: Model, pictures: int, device: torch.device) -> LossFactory:
    """The loss of the training over public random latents (`pictures`, c, h, w)."""
    size = config.data.size
    latents = np.random.default_rng(0).standard_normal((pictures, *model.latent_shape(size)), dtype=np.float32)
    captions = None if model.family.of_classes else dummy_captions(model, size, pictures)
    return diffusion_loss(config, model, latents, np.zeros(pictures, np.int64), device, captions)


def dummy_sum(
    config: Config, model: Model, parameters: Mapping[str, Tensor], device: torch.device, k: int, size: int
) -> Tensor:
    """Norms, on the CPU, of a sum over dummy pictures: two micro-batches of `size` rows, k draws a picture.

    The costliest case: nearly every part is a unit of its own, a unit of two pictures makes float64 sums necessary for
    all units, and a second micro-batch follows the first.
    """
    loss = dummy_loss(config, model, 1, device)(ItemStreams(0))
    pictures = max(1, 2 * rows_at_once(k, size) // k)
    units = [[0, 0], *[[0]] * (pictures - 2)] if pictures > 1 else [[0]]
    with full_precision():
        _, norms, _ = sum_over_units(loss, parameters, micro_batches(units, k, size, device), 1.0)
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
