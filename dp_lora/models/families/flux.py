"""FLUX.1: flow matching on latents that are packed two by two into tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dp_lora.models.families.family import Conditions
from dp_lora.models.families.sd3 import StableDiffusion3

if TYPE_CHECKING:
    from torch import Tensor

GUIDANCE = 1.0  # guidance while the guidance-distilled [dev] is trained; [schnell] takes none


@dataclass(frozen=True)
class Flux(StableDiffusion3):
    tokens: int = 512

    def encode(self, pipe: Any, caption: str, size: int) -> Conditions:
        embeds, pooled, _ = pipe.encode_prompt(caption, caption, device=pipe.device)
        return {"context": embeds, "pooled": pooled}

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        import torch

        rows, channels, height, width = x_t.shape
        ids = torch.zeros(height // 2, width // 2, 3, device=x_t.device)
        ids[..., 1] += torch.arange(height // 2, device=x_t.device)[:, None]
        ids[..., 2] += torch.arange(width // 2, device=x_t.device)[None]
        guidance = t.new_full((rows,), GUIDANCE) if denoiser.config["guidance_embeds"] else None
        tokens = denoiser(
            hidden_states=pack(x_t),
            timestep=t,
            guidance=guidance,
            pooled_projections=conditions["pooled"],
            encoder_hidden_states=conditions["context"],
            txt_ids=torch.zeros(conditions["context"].shape[1], 3, device=x_t.device),
            img_ids=ids.reshape(-1, 3),
            return_dict=False,
        )[0]
        squares = tokens.view(rows, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return squares.reshape(rows, channels, height, width)

    def start(self, latents: Tensor, pipe: Any) -> Tensor:
        return pack(latents)


def pack(latents: Tensor) -> Tensor:
    """Latents (R, c, h, w) as tokens (R, h/2 * w/2, 4 c): each is a square of two by two."""
    rows, channels, height, width = latents.shape
    squares = latents.reshape(rows, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return squares.reshape(rows, height * width // 4, 4 * channels)
