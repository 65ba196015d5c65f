"""PixArt-alpha and -Sigma: a transformer with a masked T5 caption; half of its output is a learned variance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dp_lora.models.families.family import Conditions, Family

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class PixArt(Family):
    part: str = "transformer"
    by_pipeline: bool = False  # neither the pipeline nor the transformer has a loader of LoRA

    def encode(self, pipe: Any, caption: str, size: int) -> Conditions:
        embeds, mask, _, _ = pipe.encode_prompt(
            caption, do_classifier_free_guidance=False, device=pipe.device, max_sequence_length=self.tokens
        )
        return {"context": embeds, "mask": mask, **_size(pipe.transformer.config, size, embeds.device)}

    def width(self, config: Mapping[str, Any]) -> int:
        return config["caption_channels"]

    def blank(self, config: Mapping[str, Any], size: int) -> Conditions:
        import torch

        mask = torch.ones(1, self.tokens, dtype=torch.int64)
        return super().blank(config, size) | {"mask": mask, **_size(config, size, torch.device("cpu"))}

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        both = denoiser(
            x_t,
            encoder_hidden_states=conditions["context"],
            encoder_attention_mask=conditions["mask"],
            timestep=t,
            added_cond_kwargs={name: conditions.get(name) for name in ("resolution", "aspect_ratio")},
            return_dict=False,
        )[0]
        return both[:, : x_t.shape[1]]


def _size(config: Mapping[str, Any], size: int, device: torch.device) -> Conditions:
    import torch

    conditioned = config["use_additional_conditions"]
    # null, as the published base of 1,024 pixels has it: the transformer decides by its size, and the pipeline too
    if not (config["sample_size"] == 128 if conditioned is None else conditioned):
        return {}
    resolution = torch.tensor([[size, size]], dtype=torch.float32, device=device)
    return {"resolution": resolution, "aspect_ratio": torch.ones(1, 1, device=device)}
