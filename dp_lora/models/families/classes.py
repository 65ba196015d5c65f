"""Class-conditional latent diffusion, as `pretrain_ldm` and `import_base` make it: the class embedding is one token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dp_lora.models.families.family import Conditions, Family

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ClassConditional(Family):
    """A model folder of ours; no pipeline class of diffusers draws from it."""

    pipeline: str = ""
    # attn2's to_q and to_k get no gradient from a single context token: their adapters would be noise alone
    targets: tuple[str, ...] = (
        "attn1.to_q",
        "attn1.to_k",
        "attn1.to_v",
        "attn1.to_out.0",
        "attn2.to_v",
        "attn2.to_out.0",
    )
    by_pipeline: bool = False
    tokens: int = 1

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        return denoiser(x_t, t, conditions["context"]).sample
