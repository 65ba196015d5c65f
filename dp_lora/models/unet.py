"""The class-conditional UNet of latent diffusion (Rombach et al. 2022, section 3.3) in diffusers' layout."""

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from dp_lora.config.schema import Ldm
from dp_lora.errors import InputError
from dp_lora.models.attention import use_one_token_attention
from dp_lora.models.resampling import ResidualUNet2DConditionModel

UNET_CLASSES = (UNet2DConditionModel, ResidualUNet2DConditionModel)


def build_unet(ldm: Ldm, latent_channels: int, latent_size: int) -> UNet2DConditionModel:
    """A fresh UNet: latents (N, latent_channels, latent_size, latent_size), context (N, tokens, cross_attention_dim).

    `ldm.attention` says at which resolutions, highest first, attention stands; the middle always has it. Random
    weights from torch's global generator. Raises InputError where widths, groups, heads and size do not fit.
    """
    widths = list(ldm.block_out_channels)
    _check(ldm, widths, latent_size)
    kind = ResidualUNet2DConditionModel if ldm.residual_resampling else UNet2DConditionModel
    unet = kind(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if here else "DownBlock2D" for here in ldm.attention),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=tuple("CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(ldm.attention)),
        block_out_channels=tuple(widths),
        layers_per_block=ldm.layers_per_block,
        norm_num_groups=ldm.norm_num_groups,
        cross_attention_dim=ldm.cross_attention_dim,
        # diffusers' attention_head_dim is the NUMBER of heads, per resolution
        attention_head_dim=heads(ldm),
        flip_sin_to_cos=True,
        freq_shift=0,
        downsample_padding=1,
        act_fn="silu",
        norm_eps=1e-5,
        use_linear_projection=False,
        resnet_time_scale_shift="scale_shift" if ldm.scale_shift else "default",
    )
    use_one_token_attention(unet)
    return unet


def heads(ldm: Ldm) -> int | tuple[int, ...]:
    """Number of attention heads: one number for all resolutions, or one per resolution, highest first."""
    if ldm.attention_heads is not None:
        return ldm.attention_heads
    return tuple(max(1, width // ldm.attention_head_width) for width in ldm.block_out_channels)


def _check(ldm: Ldm, widths: list[int], latent_size: int) -> None:
    for width, here in zip(widths, [*ldm.attention[:-1], True], strict=True):  # the middle has the last width
        if width % ldm.norm_num_groups:
            raise InputError(
                f"ldm.norm_num_groups={ldm.norm_num_groups}: must divide every width in ldm.block_out_channels={widths}"
            )
        key = "attention_head_width" if ldm.attention_heads is None else "attention_heads"
        if here and width % getattr(ldm, key):
            raise InputError(
                f"ldm.{key}={getattr(ldm, key)}: must divide the width {width} of ldm.block_out_channels={widths}, "
                "where attention stands"
            )
    if latent_size % 2 ** (len(widths) - 1):
        raise InputError(
            f"ldm.block_out_channels={widths}: halves the latent side {latent_size} {len(widths) - 1} times, which "
            "leaves no whole number; use fewer widths"
        )
