"""How many parameters a fine-tuning has, without making them: networks on the meta device."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from dp_lora.config.schema import Config
from dp_lora.models.adapters import add_lora, lora_parameters, matched_modules
from dp_lora.models.autoencoder import build_autoencoder, latent_size
from dp_lora.models.folder import unweighted_unet
from dp_lora.models.unet import build_unet


def meta_unet(config: Config, base: Path) -> UNet2DConditionModel:
    """The base's UNet without weights: of its folder where it is there, else as `config` would build it."""
    with torch.device("meta"):
        if (base / "unet" / "config.json").exists():
            return unweighted_unet(base)
        vae = build_autoencoder(config.autoencoder, config.public.channels, config.public.size)
        return build_unet(config.ldm, config.autoencoder.latent_channels, latent_size(vae))


def count_parameters(config: Config, base: Path) -> dict[str, Any]:
    """Parameters of the UNet, of LoRA per module kind (both factors), of the embedding, and how many are trained.

    Raises InputError for a LoRA target that matches nothing. Takes seconds at any width.
    """
    unet = meta_unet(config, base)
    total = sum(parameter.numel() for parameter in unet.parameters())
    modules = matched_modules(unet, config.lora.targets)
    add_lora(unet, config.lora.rank, config.lora.alpha, config.lora.targets, torch.Generator())
    per_kind: Counter[str] = Counter()
    lora = lora_parameters(unet, "AB")
    for name, parameter in lora.items():
        attention, _, kind = name.rpartition(".lora_")[0].rpartition("attn")[2].partition(".")
        per_kind[f"attn{attention}.{kind}"] += parameter.numel()
    trained_lora = sum(parameter.numel() for parameter in lora_parameters(unet, config.lora.train).values())
    embedding = len(config.data.classes) * unet.config["cross_attention_dim"]
    trainable = trained_lora + embedding
    return {
        "unet": total,
        "lora": sum(parameter.numel() for parameter in lora.values()),
        "lora_trained": trained_lora,
        "lora_per_kind": dict(per_kind),
        "lora_modules": modules,
        "class_embedding": embedding,
        "trainable": trainable,
        "trainable_percent": 100 * trainable / (total + trainable),
    }
