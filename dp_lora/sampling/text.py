"""Images of public prompts, drawn by the base's own pipeline of diffusers, each from separate noise."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dp_lora.config.schema import Sampling
from dp_lora.errors import InputError
from dp_lora.models.device import full_precision, pick_precision
from dp_lora.models.folder import Model
from dp_lora.models.pipeline_index import steps_and_guidance
from dp_lora.sampling.noise import image_stream, next_noise


@torch.inference_mode()
def draw_prompts(
    model: Model, labels: Sequence[int], indices: Sequence[int], sampling: Sampling, seed: int, device: torch.device
) -> Tensor:
    """One batch of images (rows, C, H, W) in [-1, 1], on the CPU, of the prompts model.classes[labels[r]].

    Row r's first noise depends on (seed, prompt, index) alone, as in `ddim.draw_pixels`; a scheduler that draws more
    has the same seed. Scheduler, steps and guidance are those that the pipeline would use for any user. Raises
    InputError for images that are not finite.
    """
    family, pipe, prompts = model.family, model.pipeline, [model.classes[label] for label in labels]
    streams = [image_stream(seed, prompt, index) for prompt, index in zip(prompts, indices, strict=True)]
    noise = next_noise(streams, model.latent_shape(model.info["size"]), device)
    generators = [torch.Generator().manual_seed(int(stream.integers(2**63))) for stream in streams]
    arguments: dict[str, Any] = {**family.call}
    if sampling.negative_prompt is not None:
        arguments["negative_prompt"] = [sampling.negative_prompt] * len(prompts)
    steps, scale = steps_and_guidance(sampling, family)
    wanted = pick_precision(sampling.precision, device, "sampling.precision")
    bfloat16 = torch.bfloat16 in (wanted, model.precision)  # a grid in training has the base's precision
    with full_precision(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
        images = pipe(
            prompt=prompts,
            latents=family.start(noise, pipe),
            generator=generators,
            num_inference_steps=steps,
            guidance_scale=scale,
            height=model.info["size"],
            width=model.info["size"],
            output_type="pt",
            **arguments,
        ).images
    if not torch.isfinite(images).all():
        raise InputError("sampling: the model gives NaN or infinite images; its weights are broken or have diverged")
    return (2 * images.float() - 1).clamp(-1, 1).cpu()
