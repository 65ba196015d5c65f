"""Room on the disk that a fine-tuning of a pipeline takes: its base, latents, and encoded captions."""

from math import prod
from pathlib import Path

import torch

from dp_lora.config.schema import Config
from dp_lora.models.autoencoder import shrinks
from dp_lora.models.counted_rows import precision_of
from dp_lora.models.families import TEXT, Family
from dp_lora.models.memory import gibibytes
from dp_lora.models.meta import meta_networks
from dp_lora.models.pipeline_index import used_parts

LATENT = 4  # bytes of a number: latents are kept in float32


def disk_line(config: Config, base: Path, family: Family) -> str:
    """A dry run's line on an existing pipeline, from public numbers alone: as many pictures as data.n_public says."""
    denoiser, vae = meta_networks(config, base)
    files = sum(path.stat().st_size for part in used_parts(base) for path in (base / part).rglob("*"))
    pictures, side = config.data.n_public, config.data.size // shrinks(vae)
    rooms = {"base": files, "latents": pictures * LATENT * vae.config["latent_channels"] * side**2}
    if not family.of_classes and config.compute.captions == "cached":
        # the empty caption is kept too
        texts = 1 + (pictures if config.data.captions else len(config.data.prompts or [config.data.prompt]))
        rooms["captions"] = texts * _caption_bytes(config, family, denoiser.config)
    shown = ", ".join(f"{gibibytes(size)} GiB of {name}" for name, size in rooms.items())
    each = ", one of each person" if config.privacy.unit == "person" else ""
    captioned = ", a caption each" if config.data.captions else ""
    return f"{shown}, for {pictures:,} pictures{each}{captioned}"


def _caption_bytes(config: Config, family: Family, settings: dict) -> int:
    """Bytes of one encoded caption in the denoiser's precision."""
    precision: torch.dtype = getattr(torch, precision_of(config))
    encoded = family.blank(settings, config.data.size)
    return sum(
        prod(tensor.shape) * (precision if name in TEXT else tensor.dtype).itemsize for name, tensor in encoded.items()
    )
