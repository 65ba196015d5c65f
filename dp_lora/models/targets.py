"""Which layers LoRA adapts, and with which rank: pure functions of the names and shapes of a UNet's tensors."""

from dp_lora.config.schema import Lora
from dp_lora.errors import InputError
from dp_lora.models.families import CLASSES, Family
from dp_lora.models.ranks import in_order_of_depth, layer_ranks
from dp_lora.models.shapes import Shapes

STUDY = ("to_q", "to_k", "to_v", "to_out.0")


def lora_targets(targets: str, family: Family = CLASSES) -> tuple[str, ...]:
    """Module names of `lora.targets`: the family's own (default), the study's, or names with commas between."""
    presets = {"default": family.targets, "study": STUDY}
    return presets.get(targets) or tuple(name.strip() for name in targets.split(",") if name.strip())


def matched_modules(denoiser: Shapes, targets: str, family: Family = CLASSES) -> list[str]:
    """Full names of the linear layers that `targets` adapt, in order of depth (down, middle, up; block by block).

    A denoiser's linear layers are those whose weight has two axes. InputError names a target that matches nothing.
    """
    linear = [name.removesuffix(".weight") for name, shape in denoiser.items() if is_linear(name, shape)]
    matched: set[str] = set()
    for target in lora_targets(targets, family):
        hits = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not hits:
            raise InputError(
                f"lora.targets={targets}: {target!r} matches no linear layer of the UNet; "
                f"use default, study, or names such as attn1.to_q,attn2.to_out.0"
            )
        matched.update(hits)
    return in_order_of_depth(matched)


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of a UNet is the weight (out, in) of a linear layer."""
    return name.endswith(".weight") and len(shape) == 2


def adapted_ranks(denoiser: Shapes, settings: Lora, family: Family = CLASSES) -> dict[str, int]:
    """The LoRA rank of each adapted layer by its full name, in order of depth.

    With a rank_schedule see `layer_ranks`. Raises InputError for a target without a match.
    """
    names = matched_modules(denoiser, settings.targets, family)
    ranks = layer_ranks(len(names), settings.rank_schedule, settings.rank, settings.rank_last)
    return dict(zip(names, ranks, strict=True))
