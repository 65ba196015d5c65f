"""The names of latent diffusion's tensors, as rules: from a name in diffusers' layout to the original one.

`openaimodel.py` numbers the UNet's blocks in one row: input_blocks.0 is the first convolution, each resolution follows
with its residual blocks and, but for the last, its downsampler; output_blocks mirrors that.
"""

import re

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from dp_lora.models.autoencoder import Vae

UNET = "model.diffusion_model."
FIRST_STAGE = "first_stage_model."
CLASS_EMBEDDING = "cond_stage_model.embedding.weight"
EMA = "model_ema."
BETAS = "betas"
ALPHAS_CUMPROD = "alphas_cumprod"

# ignored: tensors computed from betas, counters of the EMA, and losses of the first stage's own training
HARMLESS = re.compile(
    r"alphas_cumprod_prev|sqrt_alphas_cumprod|sqrt_one_minus_alphas_cumprod|log_one_minus_alphas_cumprod"
    r"|sqrt_recip_alphas_cumprod|sqrt_recipm1_alphas_cumprod|posterior_variance|posterior_log_variance_clipped"
    r"|posterior_mean_coef[12]|lvlb_weights|logvar"
    r"|ddim_sigmas|ddim_alphas|ddim_alphas_prev|ddim_sqrt_one_minus_alphas"
    r"|model_ema\.(decay|num_updates)"
    r"|first_stage_model\.loss\..+|loss\..+"
)

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
FIRST_STAGE_RESNET = {"conv_shortcut": "nin_shortcut"}
FIRST_STAGE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v"}


def unet_keys(unet: UNet2DConditionModel) -> dict[str, str]:
    """Every name in the UNet's state dict -> the checkpoint's key."""
    layers = unet.config["layers_per_block"]
    attends = ["CrossAttn" in kind for kind in unet.config["up_block_types"]]
    return {name: UNET + _unet_key(name.split("."), layers, attends) for name in unet.state_dict()}


def _unet_key(name: list[str], layers: int, attends: list[bool]) -> str:
    match name:
        case ["time_embedding", "linear_1" | "linear_2" as linear, leaf]:
            key = f"time_embed.{0 if linear == 'linear_1' else 2}.{leaf}"
        case ["conv_in", leaf]:
            key = f"input_blocks.0.0.{leaf}"
        case ["conv_norm_out", leaf]:
            key = f"out.0.{leaf}"
        case ["conv_out", leaf]:
            key = f"out.2.{leaf}"
        case ["mid_block", "resnets", index, *inner]:
            key = f"middle_block.{2 * int(index)}.{_resnet(inner)}"
        case ["mid_block", "attentions", index, *inner]:
            key = f"middle_block.{2 * int(index) + 1}.{'.'.join(inner)}"
        case ["down_blocks", level, "downsamplers", "0", *inner]:
            key = f"input_blocks.{(int(level) + 1) * (layers + 1)}.0.{_resampler(inner, 'op')}"
        case ["down_blocks", level, part, index, *inner]:
            key = f"input_blocks.{int(level) * (layers + 1) + 1 + int(index)}.{_resnet_or_attention(part, inner)}"
        case ["up_blocks", level, "upsamplers", "0", *inner]:
            # after the level's last block, which has a residual block, and attention or not
            place = 1 + attends[int(level)]
            key = f"output_blocks.{int(level) * (layers + 1) + layers}.{place}.{_resampler(inner, 'conv')}"
        case ["up_blocks", level, part, index, *inner]:
            key = f"output_blocks.{int(level) * (layers + 1) + int(index)}.{_resnet_or_attention(part, inner)}"
        case _:
            raise ValueError(f"no rule for the UNet's {'.'.join(name)}")
    return key


def _resnet_or_attention(part: str, inner: list[str]) -> str:
    return f"0.{_resnet(inner)}" if part == "resnets" else f"1.{'.'.join(inner)}"


def _resnet(inner: list[str]) -> str:
    return ".".join([RESNET[inner[0]], *inner[1:]])


def _resampler(inner: list[str], convolution: str) -> str:
    # a convolution, or a residual block that resamples
    return ".".join([convolution, *inner[1:]]) if inner[0] == "conv" else _resnet(inner)


def first_stage_keys(vae: Vae) -> dict[str, str]:
    """Every name in the autoencoder's state dict -> the checkpoint's key."""
    levels = len(vae.config["block_out_channels"])
    return {name: FIRST_STAGE + _first_stage_key(name.split("."), levels) for name in vae.state_dict()}


def _first_stage_key(name: list[str], levels: int) -> str:
    match name:
        case [coder, "conv_norm_out", leaf]:
            key = f"{coder}.norm_out.{leaf}"
        case [coder, "mid_block", "resnets", index, *inner]:
            key = f"{coder}.mid.block_{int(index) + 1}.{_first_stage_part('resnets', inner)}"
        case [coder, "mid_block", "attentions", index, *inner]:
            key = f"{coder}.mid.attn_{int(index) + 1}.{_first_stage_part('attentions', inner)}"
        case ["encoder", "down_blocks", level, part, index, *inner]:
            key = f"encoder.down.{level}.{_first_stage_place(part, index)}.{_first_stage_part(part, inner)}"
        case ["decoder", "up_blocks", level, part, index, *inner]:
            # the original counts the decoder's levels from the highest resolution too
            up = levels - 1 - int(level)
            key = f"decoder.up.{up}.{_first_stage_place(part, index)}.{_first_stage_part(part, inner)}"
        case (
            ["encoder" | "decoder", "conv_in" | "conv_out", _]
            | ["quant_conv" | "post_quant_conv", _]
            | ["quantize", "embedding", "weight"]
        ):
            key = ".".join(name)
        case _:
            raise ValueError(f"no rule for the autoencoder's {'.'.join(name)}")
    return key


def _first_stage_place(part: str, index: str) -> str:
    places = {"resnets": f"block.{index}", "attentions": f"attn.{index}"}
    return places.get(part) or {"downsamplers": "downsample", "upsamplers": "upsample"}[part]


def _first_stage_part(part: str, inner: list[str]) -> str:
    if part == "attentions":
        if inner[:2] == ["to_out", "0"]:
            return ".".join(["proj_out", *inner[2:]])
        return ".".join([FIRST_STAGE_ATTENTION[inner[0]], *inner[1:]])
    return ".".join([FIRST_STAGE_RESNET.get(inner[0], inner[0]), *inner[1:]])


def ema_key(key: str) -> str:
    """The key of the moving average of the tensor `key` (below `model.`): its name without dots."""
    return EMA + key.removeprefix("model.").replace(".", "")
