"""The KL autoencoder of latent diffusion (Rombach et al. 2022, section 3.1): pixels <-> normalised latents."""

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from dp_lora.config.schema import Autoencoder
from dp_lora.errors import InputError


def build_autoencoder(autoencoder: Autoencoder, channels: int, size: int) -> AutoencoderKL:
    """A fresh autoencoder for pixels (N, channels, size, size) in [-1, 1]; each width but the last halves the side.

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
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=tuple(widths),
        layers_per_block=autoencoder.layers_per_block,
        latent_channels=autoencoder.latent_channels,
        norm_num_groups=autoencoder.norm_num_groups,
        sample_size=size,
        scaling_factor=1.0,  # the latents are normalised per channel instead: latents_mean, latents_std
        force_upcast=False,
    )


def latent_size(vae: AutoencoderKL) -> int:
    """Side of the latent that belongs to a picture of the autoencoder's own size."""
    return vae.config["sample_size"] // 2 ** (len(vae.config["block_out_channels"]) - 1)


def _normalisation(vae: AutoencoderKL, like: Tensor) -> tuple[Tensor, Tensor]:
    channels = vae.config["latent_channels"]
    mean = vae.config["latents_mean"] or [0.0] * channels
    std = vae.config["latents_std"] or [1.0] * channels
    shape = (1, channels, 1, 1)
    return (
        torch.tensor(mean, device=like.device, dtype=like.dtype).view(shape),
        torch.tensor(std, device=like.device, dtype=like.dtype).view(shape) / vae.config["scaling_factor"],
    )


def encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Normalised mean of the posterior: pixels (N, C, H, W) in [-1, 1] -> latents (N, c, h, w).

    Normalised by the per-channel mean and std of the public pictures, which stand in the autoencoder's config: no
    statistic of the pictures encoded here enters.
    """
    latents = vae.encode(pixels).latent_dist.mean
    mean, std = _normalisation(vae, latents)
    return (latents - mean) / std


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Normalised latents (N, c, h, w) -> pixels (N, C, H, W), clamped to [-1, 1]."""
    mean, std = _normalisation(vae, latents)
    return vae.decode(latents * std + mean).sample.clamp(-1, 1)
