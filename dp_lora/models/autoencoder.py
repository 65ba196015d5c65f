"""The first stages of latent diffusion (Rombach et al. 2022, section 3.1), KL and VQ: pixels <-> normalised latents."""

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from torch import Tensor

from dp_lora.config.schema import Autoencoder
from dp_lora.errors import InputError

VAE_CLASSES = (AutoencoderKL, VQModel)
Vae = AutoencoderKL | VQModel


def build_autoencoder(autoencoder: Autoencoder, channels: int, size: int) -> Vae:
    """A fresh autoencoder for pixels (N, channels, size, size) in [-1, 1]; each width but the last halves the side.

    `autoencoder.attention` says at which resolutions, highest first, self-attention stands; the middle always has it.
    Random weights from torch's global generator. Raises InputError where widths, groups and size do not fit.
    """
    widths = list(autoencoder.block_out_channels)
    if any(width % autoencoder.norm_num_groups for width in widths):
        raise InputError(
            f"autoencoder.norm_num_groups={autoencoder.norm_num_groups}: must divide every width in "
            f"autoencoder.block_out_channels={widths}"
        )
    if size % 2 ** (len(widths) - 1):
        raise InputError(
            f"autoencoder.block_out_channels={widths}: halves the side {size} {len(widths) - 1} times, which leaves no "
            "whole number; use fewer widths"
        )
    attention = autoencoder.attention or [False] * len(widths)
    arguments: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": channels,
        "down_block_types": tuple("AttnDownEncoderBlock2D" if here else "DownEncoderBlock2D" for here in attention),
        "up_block_types": tuple("AttnUpDecoderBlock2D" if here else "UpDecoderBlock2D" for here in reversed(attention)),
        "block_out_channels": tuple(widths),
        "layers_per_block": autoencoder.layers_per_block,
        "latent_channels": autoencoder.latent_channels,
        "norm_num_groups": autoencoder.norm_num_groups,
        "sample_size": size,
        "scaling_factor": 1.0,  # the latents are normalised per channel instead: latents_mean, latents_std
        "force_upcast": False,
    }
    if autoencoder.kind == "vq":
        entries = autoencoder.num_vq_embeddings
        return VQModel(**arguments, num_vq_embeddings=entries, vq_embed_dim=autoencoder.latent_channels)
    return AutoencoderKL(**arguments)


def shrinks(vae: Any) -> int:
    """The factor by which an autoencoder shrinks a picture's side."""
    config = vae.config
    return 2 ** (len(config.get("block_out_channels") or config["encoder_block_out_channels"]) - 1)


def latent_size(vae: Any) -> int:
    """Side of the latent that belongs to a picture of the autoencoder's own size."""
    return vae.config["sample_size"] // shrinks(vae)


def _normalisation(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    channels = vae.config["latent_channels"]
    # a VQ autoencoder has none of its own accord; those of pipelines have a shift in the place of a mean per channel
    mean = vae.config.get("latents_mean") or [vae.config.get("shift_factor") or 0.0] * channels
    std = vae.config.get("latents_std") or [1.0] * channels
    shape = (1, channels, 1, 1)
    return (
        torch.tensor(mean, device=like.device, dtype=like.dtype).view(shape),
        torch.tensor(std, device=like.device, dtype=like.dtype).view(shape) / vae.config["scaling_factor"],
    )


@torch.no_grad()
def fold_normalisation(vae: Any) -> None:
    """Move latents_mean and latents_std of an AutoencoderKL from its config into its weights, in place.

    Stock pipelines know only a scaling_factor. `encode` and `decode` give the same results as before, up to rounding.
    """
    mean, std = _normalisation(vae, vae.quant_conv.weight)
    mean, std, channels = mean.flatten(), std.flatten(), len(mean.flatten())
    inward, outward = vae.quant_conv, vae.post_quant_conv
    inward.bias[:channels] = (inward.bias[:channels] - mean) / std
    inward.weight[:channels] /= std.view(-1, 1, 1, 1)
    inward.bias[channels:] -= 2 * std.log()  # of the logarithms of the variances
    outward.bias += outward.weight.flatten(1) @ mean
    outward.weight *= std.view(1, -1, 1, 1)
    vae.register_to_config(latents_mean=None, latents_std=None, shift_factor=None, scaling_factor=1.0)


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Normalised latents (N, c, h, w) of pixels (N, C, H, W) in [-1, 1]; `vae`: any autoencoder of diffusers' bases.

    KL: the mean of the posterior; VQ: before quantisation, as latent diffusion trains on them; deep compression: the
    its only latent. Normalised by the per-channel mean and std, or the shift, from the autoencoder's config: no
    statistic of the pictures encoded here enters.
    """
    encoded = vae.encode(pixels)
    if hasattr(encoded, "latent_dist"):
        latents = encoded.latent_dist.mean
    else:
        latents = encoded.latents if isinstance(vae, VQModel) else encoded.latent
    mean, std = _normalisation(vae, latents)
    return (latents - mean) / std


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Normalised latents (N, c, h, w) -> pixels (N, C, H, W), clamped to [-1, 1]; VQ quantises them first."""
    mean, std = _normalisation(vae, latents)
    return vae.decode(latents * std + mean).sample.clamp(-1, 1)
