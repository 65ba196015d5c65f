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
EMNIST = (
    "public.classes=[A,B,C,D,E,F,G,H,I,J,K,L,M,N,O,P,Q,R,S,T,U,V,W,X,Y,Z] "
    "public.size=32 public.channels=3 autoencoder.block_out_channels=[128,256,384,640] autoencoder.layers_per_block=2 "
    "autoencoder.latent_channels=3 autoencoder.attention=[true,true,true,false] autoencoder.norm_num_groups=32 "
    "ldm.block_out_channels=[64,128] ldm.layers_per_block=1 ldm.attention=[true,true] ldm.attention_heads=2 "
    "ldm.scale_shift=true ldm.residual_resampling=true ldm.cross_attention_dim=5 ldm.norm_num_groups=32 "
    "ldm.beta_schedule=linear ldm.beta_start=0.0015 ldm.beta_end=0.0155 ldm.prediction_type=epsilon"
)


def real_config(name: str, overrides: str = "") -> Config:
    """The config of a model at its real width."""
    return load("cin256", {}, overrides) if name == "cin256" else load("mnist5k", {}, f"{EMNIST} {overrides}")


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
