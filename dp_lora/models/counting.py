"""Count a fine-tuning's parameters without making them."""

from collections import Counter
from math import prod
from typing import Any

from dp_lora.config.schema import Config
from dp_lora.models.shapes import BaseShapes, Shapes
from dp_lora.models.targets import adapted_ranks


def _size(tensors: Shapes) -> int:
    return sum(map(prod, tensors.values()))


def count_parameters(config: Config, base: BaseShapes) -> dict[str, Any]:
    """Parameters of the base's parts, of LoRA per module kind (both factors), of the embedding, and what is trained.

    `total` is the base's frozen weights and what is trained. The fresh embedding has one row per class of data.classes;
    `trainable_with_base_rows` counts one per class of the base in its place, as the released code does, which keeps the
    base's table. `lora_modules` and `lora_ranks` list the adapted layers in order of depth. Raises InputError for a
    LoRA target that matches nothing.
    """
    frozen, first_stage = _size(base.denoiser), _size(base.vae)
    ranks = adapted_ranks(base.denoiser, config.lora, base.family)
    factors = {name: lora_factors(base.denoiser, name, rank) for name, rank in ranks.items()}
    per_kind: Counter[str] = Counter()
    for name, (a, b) in factors.items():
        attention, _, kind = name.rpartition("attn")[2].partition(".")
        per_kind[f"attn{attention}.{kind}"] += a + b
    trained_lora = sum(b if config.lora.train == "B" else a + b for a, b in factors.values())
    embedding, base_embedding = len(config.data.classes) * base.context, base.classes * base.context
    trainable = trained_lora + embedding
    parts: Counter[str] = Counter()
    for name, shape in sorted(base.vae.items()):
        parts[name.partition(".")[0]] += prod(shape)
    return {
        "total": frozen + first_stage + trainable,
        "unet": frozen,
        "first_stage": first_stage,
        "first_stage_parts": dict(parts),
        "base_class_embedding": base_embedding,
        "lora": sum(per_kind.values()),
        "lora_trained": trained_lora,
        "lora_per_kind": dict(per_kind),
        "lora_modules": list(ranks),
        "lora_ranks": list(ranks.values()),
        "class_embedding": embedding,
        "trainable": trainable,
        "trainable_with_base_rows": trained_lora + base_embedding,
        "trainable_percent": 100 * trainable / (frozen + trainable),
    }


def lora_factors(denoiser: Shapes, name: str, rank: int) -> tuple[int, int]:
    """Parameters of the factors A (rank, in) and B (out, rank) of a layer's adapter."""
    out_features, in_features = denoiser[f"{name}.weight"]
    return rank * in_features, rank * out_features
