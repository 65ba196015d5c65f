"""Stable Diffusion 3: a transformer over picture and caption tokens, trained by flow matching."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dp_lora.models.families.family import Conditions, Family

if TYPE_CHECKING:
    from torch import Tensor

JOINT = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip


@dataclass(frozen=True)
class StableDiffusion3(Family):
    part: str = "transformer"
    flow: bool = True
    targets: tuple[str, ...] = JOINT
    tokens: int = 77 + 256  # CLIP's, then T5's

    def encode(self, pipe: Any, caption: str, size: int) -> Conditions:
        embeds, _, pooled, _ = pipe.encode_prompt(
            caption, caption, caption, device=pipe.device, do_classifier_free_guidance=False
        )
        return {"context": embeds, "pooled": pooled}

    def width(self, config: Mapping[str, Any]) -> int:
        return config["joint_attention_dim"]

    def blank(self, config: Mapping[str, Any], size: int) -> Conditions:
        import torch

        return super().blank(config, size) | {"pooled": torch.zeros(1, config["pooled_projection_dim"])}

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        return denoiser(
            hidden_states=x_t,
            timestep=1000 * t,
            encoder_hidden_states=conditions["context"],
            pooled_projections=conditions["pooled"],
            return_dict=False,
        )[0]
