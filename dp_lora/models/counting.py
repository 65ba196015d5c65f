"""How many parameters a fine-tuning has, without making them: networks on the meta device."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from dp_lora.config.classes import class_names
from dp_lora.config.schema import Config
from dp_lora.models.adapters import add_lora, lora_parameters, matched_modules
from dp_lora.models.autoencoder import build_autoencoder, latent_size
from dp_lora.models.families import CLASSES, Family
from dp_lora.models.folder import Denoiser, load_info, unweighted_unet, unweighted_vae
from dp_lora.models.pipeline_index import is_pipeline
from dp_lora.models.pipelines import family_of
from dp_lora.models.unet import build_unet


def base_family(base: Path) -> Family:
    """The family of a base; of one that is not there yet that of our own model folders."""
    return family_of(base) if is_pipeline(base) else CLASSES


def meta_unet(config: Config, base: Path) -> Denoiser:
    """The base's denoiser without weights: of its folder where it is there, else as `config` would build it."""
    with torch.device("meta"):
        if is_pipeline(base) or (base / "unet" / "config.json").exists():
            return unweighted_unet(base)
        vae = build_autoencoder(config.autoencoder, config.public.channels, config.public.size)
        return build_unet(config.ldm, config.autoencoder.latent_channels, latent_size(vae))


def meta_vae(config: Config, base: Path) -> Any:
    """The base's autoencoder without weights: of its folder where it is there, else as `config` would build it."""
    with torch.device("meta"):
        if (base / "vae" / "config.json").exists():
            return unweighted_vae(base)
        return build_autoencoder(config.autoencoder, config.public.channels, config.public.size)


def _base_classes(config: Config, base: Path) -> int:
    if is_pipeline(base):
        return 0
    if (base / "model.json").exists():
        return len(load_info(base)["classes"])
    return len(class_names(config.public.classes))


def _size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def count_parameters(config: Config, base: Path) -> dict[str, Any]:
    """Parameters of the base's parts, of LoRA per module kind (both factors), of the embedding, and what is trained.

    `total` is the base's frozen weights and what is trained. The fresh embedding has one row per class of data.classes;
    `trainable_with_base_rows` counts one per class of the base in its place, as the released code does, which keeps the
    base's table. `lora_modules` and `lora_ranks` list the adapted layers in order of depth. Raises InputError for a
    LoRA target that matches nothing. Takes seconds at any width.
    """
    unet = meta_unet(config, base)
    vae = meta_vae(config, base)
    frozen = _size(unet)
    family = base_family(base)
    modules = matched_modules(unet, config.lora.targets, family)
    made = add_lora(unet, config.lora, torch.Generator(), family)
    per_kind: Counter[str] = Counter()
    lora = lora_parameters(unet, "AB")
    for name, parameter in lora.items():
        block, _, kind = name.rpartition(".lora_")[0].rpartition("attn")
        per_kind[f"attn{kind}" if block else name.rpartition(".lora_")[0]] += parameter.numel()
    trained_lora = sum(parameter.numel() for parameter in lora_parameters(unet, config.lora.train).values())
    width = unet.config["cross_attention_dim"] if family is CLASSES else 0
    embedding, base_embedding = len(config.data.classes) * width, _base_classes(config, base) * width
    trainable = trained_lora + embedding
    first_stage = _size(vae)
    return {
        "total": frozen + first_stage + trainable,
        "unet": frozen,
        "first_stage": first_stage,
        "first_stage_parts": {name: _size(part) for name, part in vae.named_children()},
        "base_class_embedding": base_embedding,
        "lora": sum(parameter.numel() for parameter in lora.values()),
        "lora_trained": trained_lora,
        "lora_per_kind": dict(per_kind),
        "lora_modules": modules,
        "lora_ranks": [(made.rank_pattern or {}).get(name, made.r) for name in modules],
        "class_embedding": embedding,
        "trainable": trainable,
        "trainable_with_base_rows": trained_lora + base_embedding,
        "trainable_percent": 100 * trainable / (frozen + trainable),
    }
