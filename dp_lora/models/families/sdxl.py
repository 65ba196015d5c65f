"""Stable Diffusion XL: two text encoders, a pooled caption, and the size as six numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dp_lora.models.families.family import Conditions, Family

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class StableDiffusionXL(Family):
    def encode(self, pipe: Any, caption: str, size: int) -> Conditions:
        embeds, _, pooled, _ = pipe.encode_prompt(caption, device=pipe.device, do_classifier_free_guidance=False)
        if not caption and pipe.config["force_zeros_for_empty_prompt"]:
            embeds, pooled = embeds * 0, pooled * 0  # the pipeline guides away from zeros
        return {"context": embeds, "pooled": pooled, "time_ids": _time_ids(size).to(embeds.device)}

    def blank(self, config: Mapping[str, Any], size: int) -> Conditions:
        import torch

        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        return super().blank(config, size) | {"pooled": torch.zeros(1, pooled), "time_ids": _time_ids(size)}

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        added = {"text_embeds": conditions["pooled"], "time_ids": conditions["time_ids"]}
        return denoiser(x_t, t, conditions["context"], added_cond_kwargs=added, return_dict=False)[0]


def _time_ids(size: int) -> Tensor:
    import torch

    # original size, crop's corner, target size: every picture is a whole centre crop of one size
    return torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32)
