"""DDIM (Song et al. 2021, arXiv 2010.02502, equation 12) with classifier-free guidance (Ho & Salimans 2022)."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from numpy.typing import NDArray
from torch import Tensor

from dp_lora.config.schema import Sampling
from dp_lora.data.pixels import to_uint8
from dp_lora.errors import InputError
from dp_lora.models.autoencoder import decode
from dp_lora.models.device import full_precision, pick_precision
from dp_lora.models.diffusion_classifier import best_class
from dp_lora.models.folder import Model
from dp_lora.models.pipeline_index import steps_and_guidance
from dp_lora.sampling.noise import image_stream, next_noise
from dp_lora.sampling.text import draw_prompts

AGAIN = 16  # images that are drawn anew at once, or sampling.batch_size where that is smaller
DECODE_VALUES = 2**22  # pixel values decoded at once: bounds the decoder's memory at any image size

Streams = Sequence[np.random.Generator]


def timesteps(scheduler: DDIMScheduler, steps: int) -> list[int]:
    """The descending timesteps of a chain; sets them in `scheduler`.

    Raises InputError where the scheduler's spacing would begin far below pure noise or outside the chain.
    """
    total = scheduler.config["num_train_timesteps"]
    if not 1 <= steps <= total:
        raise InputError(f"sampling.steps={steps}: must be in [1, {total}]")
    scheduler.set_timesteps(steps)
    chain = [int(t) for t in scheduler.timesteps]
    # leading spacing takes every (total // steps)-th timestep: rounded down, it may leave out much of the chain
    if chain[0] >= total or chain[0] + total // steps < 0.75 * total:
        divisors = [d for d in range(1, total // 2 + 1) if total % d == 0]
        raise InputError(
            f"sampling.steps={steps}: the chain would begin at timestep {chain[0]} of {total}; "
            f"take a divisor of {total}, such as {min(divisors, key=lambda d: abs(d - steps))}"
        )
    return chain


def _context(model: Model, labels: Tensor, guidance_scale: float) -> Tensor:
    """Class embeddings (rows, 1, D); with guidance (2 rows, 1, D), the null rows first."""
    conditional = model.embedded()[labels].unsqueeze(1)
    if guidance_scale == 1:
        return conditional
    if model.null_row is None:
        raise InputError(
            f"sampling.guidance_scale={guidance_scale:g}: this model was trained without class dropout and has no null "
            "row to guide away from; set sampling.guidance_scale=1"
        )
    null = model.null_row.expand_as(conditional)
    return torch.cat([null, conditional])


def _predictor(model: Model, sampling: Sampling, device: torch.device) -> Callable[[Tensor, int, Tensor], Tensor]:
    bfloat16 = pick_precision(sampling.precision, device, "sampling.precision") == torch.bfloat16

    def predict(rows: Tensor, t: int, context: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
            return model.predict(rows, torch.full((len(rows),), t, device=device), {"context": context})

    return predict


def _draw_latents(
    model: Model, labels: Sequence[int], streams: Streams, sampling: Sampling, device: torch.device
) -> Tensor:
    scheduler = DDIMScheduler.from_config(model.scheduler.config)
    steps, scale = steps_and_guidance(sampling, model.family)
    chain = timesteps(scheduler, steps)
    context = _context(model, torch.as_tensor(labels, device=device), scale)
    predict = _predictor(model, sampling, device)
    shape = _shape(model)
    latents = next_noise(streams, shape, device)
    for t in chain:
        prediction = predict(latents if scale == 1 else torch.cat([latents, latents]), t, context)
        if scale != 1:
            # guidance is linear in the prediction, so epsilon and v give the same guided step
            null, conditional = prediction.chunk(2)
            prediction = null + scale * (conditional - null)
        noise = next_noise(streams, shape, device) if sampling.eta > 0 else None
        step = scheduler.step(prediction, t, latents, eta=sampling.eta, variance_noise=noise, return_dict=False)
        latents = step[0]
    if not torch.isfinite(latents).all():
        raise InputError("sampling: the model gives NaN or infinite latents; its weights are broken or have diverged")
    return latents


def _shape(model: Model) -> tuple[int, int, int]:
    side = model.denoiser.config["sample_size"]
    return model.denoiser.config["in_channels"], side, side


def _wrong(
    model: Model, latents: Tensor, labels: Sequence[int], streams: Streams, sampling: Sampling, device: torch.device
) -> list[int]:
    """Rows of the latents that the model itself takes for another class."""
    noise = partial(next_noise, streams, _shape(model), device)
    found = best_class(model, latents, noise, _predictor(model, sampling, device))
    return torch.nonzero(found != torch.as_tensor(labels, device=device)).flatten().tolist()


def _draw_in_attempts(
    model: Model, labels: Sequence[int], streams: Streams, sampling: Sampling, device: torch.device
) -> Tensor:
    """Latents, each drawn anew from its own stream until the model takes it for its class, in sampling.attempts."""
    latents = _draw_latents(model, labels, streams, sampling, device)
    wrong: list[int] = []
    if sampling.attempts > 1:
        wrong = _wrong(model, latents, labels, streams, sampling, device)
    at_once = min(AGAIN, sampling.batch_size)
    for attempt in range(1, sampling.attempts):
        still: list[int] = []
        for start in range(0, len(wrong), at_once):
            rows = wrong[start : start + at_once]
            # always as many rows: a batch's number of rows changes rounding, and the other rows decide that number
            idle = range(at_once - len(rows))
            of_rows = [labels[row] for row in rows] + [labels[rows[0]] for _ in idle]
            drawing = [streams[row] for row in rows] + [image_stream(0, "idle", row) for row in idle]
            latents[rows] = (drawn := _draw_latents(model, of_rows, drawing, sampling, device))[: len(rows)]
            if attempt + 1 < sampling.attempts:
                again = _wrong(model, drawn, of_rows, drawing, sampling, device)
                still += [rows[row] for row in again if row < len(rows)]
        wrong = still
    return latents


@torch.inference_mode()
def draw_pixels(
    model: Model, labels: Sequence[int], indices: Sequence[int], sampling: Sampling, seed: int, device: torch.device
) -> Tensor:
    """One batch of images (rows, C, H, W) in [-1, 1], on the CPU.

    Row r is image number indices[r] of class model.classes[labels[r]]. It depends on (seed, class, index) and the
    sampling settings; the other rows and their number change it by rounding alone (below 1e-4 in float32). With
    sampling.attempts above 1 it also depends on the model's other classes: one of them may take the image; where two
    classes fit it equally well, rounding may decide which image is kept. Networks
    must lie on `device`, in evaluation mode. Raises InputError for guidance without a null row and for latents that are
    not finite.
    """
    with full_precision():
        streams = [image_stream(seed, model.classes[c], i) for c, i in zip(labels, indices, strict=True)]
        latents = _draw_in_attempts(model, labels, streams, sampling, device)
        rows = max(1, DECODE_VALUES // (model.info["size"] ** 2 * model.info["channels"]))
        return torch.cat([decode(model.vae, part).cpu() for part in latents.split(rows)])


def draw(
    model: Model, labels: Sequence[int], indices: Sequence[int], sampling: Sampling, seed: int, device: torch.device
) -> NDArray[np.uint8]:
    """`draw_pixels`, or for a base of captions `draw_prompts`, as uint8 (rows, H, W, C)."""
    of = draw_pixels if model.family.of_classes else draw_prompts
    return to_uint8(of(model, labels, indices, sampling, seed, device))


def draw_in_batches(
    model: Model, labels: Sequence[int], indices: Sequence[int], sampling: Sampling, seed: int, device: torch.device
) -> NDArray[np.uint8]:
    """`draw`, sampling.batch_size images at a time."""
    step = sampling.batch_size
    batches = [slice(start, start + step) for start in range(0, len(labels), step)]
    return np.concatenate([draw(model, labels[b], indices[b], sampling, seed, device) for b in batches])
