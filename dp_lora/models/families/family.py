"""The differences between pipelines of diffusers, and nothing else: captions, a forward pass, targets, loading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


Conditions = dict[str, "Tensor"]  # conditions of rows, one entry per row in each tensor
TEXT = ("context", "pooled")  # conditions that hold a caption or a class; the others are sizes and masks


@dataclass(frozen=True)
class Family:
    """A pipeline class of diffusers whose denoiser can be fine-tuned. Subclasses state the differences."""

    pipeline: str  # name of the class
    part: str = "unet"  # the component that is adapted, and the prefix of its keys in the released file
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")  # of lora.targets=default
    flow: bool = False  # trained by flow matching: its times are in (0, 1]
    by_pipeline: bool = True  # whether pipe.load_lora_weights reads the release; else PEFT alone
    tokens: int = 77  # longest caption, in tokens of the denoiser's context
    call: Mapping[str, Any] = field(default_factory=dict)  # arguments of the pipeline when it draws
    loading: tuple[str, ...] = ()  # Python that a release needs before PEFT puts it on the pipeline `pipe`
    of_classes: bool = False  # conditioned on rows of a class table, which is trained, instead of captions

    def encode(self, pipe: Any, caption: str, size: int) -> Conditions:
        """One caption's conditions for the denoiser, (1, ...) each; `size`: side of the pictures in pixels."""
        embeds, _ = pipe.encode_prompt(caption, pipe.device, 1, False)
        return {"context": embeds}

    def blank(self, config: Mapping[str, Any], size: int) -> Conditions:
        """Conditions (1, ...) of a row that belongs to nobody: shapes as `encode` gives them, by the denoiser's config.

        They say nothing of any caption, so that dummies and padded rows read none.
        """
        import torch

        return {"context": torch.zeros(1, self.tokens, self.width(config))}

    def width(self, config: Mapping[str, Any]) -> int:
        """Width of a token of the context."""
        return config["cross_attention_dim"]

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The denoiser's output (R, c, h, w) at noisy latents x_t of the same shape.

        `t` (R,): timesteps (int64), or of a flow its times in (0, 1].
        """
        return denoiser(x_t, t, conditions["context"], return_dict=False)[0]

    def start(self, latents: Tensor, pipe: Any) -> Tensor:
        """Noise (R, c, h, w) as the pipeline takes it for its `latents`."""
        return latents
