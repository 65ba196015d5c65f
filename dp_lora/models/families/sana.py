"""Sana: linear attention on the latents of a deep-compression autoencoder, trained by flow matching."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dp_lora.models.families.family import Conditions, Family

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sana(Family):
    part: str = "transformer"
    flow: bool = True
    tokens: int = 300

    def encode(self, pipe: Any, caption: str, size: int) -> Conditions:
        embeds, mask, _, _ = pipe.encode_prompt(
            caption, do_classifier_free_guidance=False, device=pipe.device, max_sequence_length=self.tokens
        )
        return {"context": embeds, "mask": mask}

    def width(self, config: Mapping[str, Any]) -> int:
        return config["caption_channels"]

    def blank(self, config: Mapping[str, Any], size: int) -> Conditions:
        import torch

        return super().blank(config, size) | {"mask": torch.ones(1, self.tokens, dtype=torch.int64)}

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        return denoiser(
            x_t,
            encoder_hidden_states=conditions["context"],
            encoder_attention_mask=conditions["mask"],
            timestep=1000 * t * denoiser.config["timestep_scale"],
            return_dict=False,
        )[0]
