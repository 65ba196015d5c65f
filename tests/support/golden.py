"""Data that the original latent-diffusion code computed (tests/data/golden), and configs of its two tiny models."""

import functools
import json
import lzma
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dp_lora.config import Config, load

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
NAMES = ("cin256", "emnist")
# the tiny models' widths; their GroupNorm has 4 groups
TINY = {
    "cin256": (
        "public.size=64 autoencoder.num_vq_embeddings=256 autoencoder.block_out_channels=[8,16,16,32] "
        "autoencoder.norm_num_groups=4 ldm.block_out_channels=[8,16,32] ldm.attention_head_width=4 "
        "ldm.norm_num_groups=4 ldm.cross_attention_dim=12"
    ),
    "emnist": (
        "autoencoder.block_out_channels=[8,16,24,40] autoencoder.norm_num_groups=4 ldm.block_out_channels=[16,32] "
        "ldm.norm_num_groups=4"
    ),
}


def real_config(name: str, overrides: str = "") -> Config:
    """The config of a model at its real width."""
    return load({"cin256": "cin256", "emnist": "emnist32-conditional"}[name], {}, overrides)


@functools.cache
def golden_config(name: str, overrides: str = "") -> Config:
    """The config of a tiny model."""
    return real_config(name, f"{TINY[name]} {overrides}")


@functools.cache
def _unpacked() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


@functools.cache
def checkpoint(name: str) -> Path:
    """A tiny model's checkpoint, unpacked once per process."""
    path = Path(_unpacked().name) / f"{name}.ckpt"
    path.write_bytes(lzma.decompress((GOLDEN / f"{name}-tiny" / "model.ckpt.xz").read_bytes()))
    return path


@functools.cache
def arrays(name: str) -> dict[str, Tensor]:
    """Inputs and outputs of a tiny model."""
    with np.load(GOLDEN / f"{name}-tiny" / "io.npz") as archive:
        return {key: torch.from_numpy(archive[key]) for key in archive.files}


def golden_json(path: str) -> Any:
    return json.loads((GOLDEN / path).read_text())


def meta_state(name: str) -> dict[str, Tensor]:
    """The state dict of a model at its real width, without its numbers."""
    keys = golden_json(f"{name}-keys.json")["keys"]
    return {key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for key, (shape, dtype) in keys.items()}
