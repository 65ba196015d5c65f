"""Latent diffusion's residual resamplers (`resblock_updown`): a residual block halves or doubles the side.

diffusers has them in blocks without cross-attention alone, and passes its other resamplers no time embedding; so the
resamplers of its cross-attention blocks are replaced, and each block hands them the embedding that it is called with.
"""

import functools
from typing import Any

from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn


class ResidualResampler(ResnetBlock2D):
    """A residual block (N, C, H, W) -> (N, C, H/2, W/2) or (N, C, 2H, 2W), called as diffusers calls its resamplers."""

    time_embedding: Tensor | None = None

    def forward(self, hidden_states: Tensor, *_: Any) -> Tensor:
        if self.time_embedding is None:
            raise RuntimeError("a residual resampler is called by its own block alone, which has the time embedding")
        return super().forward(hidden_states, self.time_embedding)


def _resamplers(block: nn.Module) -> list[ResidualResampler]:
    found = getattr(block, "downsamplers", None) or getattr(block, "upsamplers", None) or []
    return [module for module in found if isinstance(module, ResidualResampler)]


def _hand_over(block: nn.Module, _: tuple, kwargs: dict[str, Any]) -> None:
    for resampler in _resamplers(block):
        resampler.time_embedding = kwargs["temb"]


def _take_back(block: nn.Module, *_: Any) -> None:
    # a reference left behind would keep the graph of a whole forward pass alive
    for resampler in _resamplers(block):
        resampler.time_embedding = None


class ResidualUNet2DConditionModel(UNet2DConditionModel):
    """diffusers' UNet with residual resamplers; same arguments, same config but for its `_class_name`.

    Stock diffusers cannot build it: `down_blocks.i.downsamplers.0` and `up_blocks.i.upsamplers.0` are ResnetBlock2D.
    """

    # diffusers reads the names of a config's keys off this signature
    @functools.wraps(UNet2DConditionModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        widths = list(self.config["block_out_channels"])
        for block, width in zip(self.down_blocks, widths, strict=True):
            if block.downsamplers is not None:
                block.downsamplers = nn.ModuleList([self._resampler(width, down=True)])
        for block, width in zip(self.up_blocks, reversed(widths), strict=True):
            if block.upsamplers is not None:
                block.upsamplers = nn.ModuleList([self._resampler(width, up=True)])
        for block in [*self.down_blocks, *self.up_blocks]:
            # hooks that capture no module, so that a deep copy of the UNet calls its own
            block.register_forward_pre_hook(_hand_over, with_kwargs=True)
            block.register_forward_hook(_take_back, always_call=True)

    def _resampler(self, width: int, *, down: bool = False, up: bool = False) -> ResidualResampler:
        return ResidualResampler(
            in_channels=width,
            out_channels=width,
            temb_channels=4 * self.config["block_out_channels"][0],
            eps=self.config["norm_eps"],
            groups=self.config["norm_num_groups"],
            non_linearity=self.config["act_fn"],
            time_embedding_norm=self.config["resnet_time_scale_shift"],
            down=down,
            up=up,
        )
