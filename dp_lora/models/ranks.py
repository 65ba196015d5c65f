"""The LoRA rank of each adapted layer: one for all, or falling with depth."""

import math
from collections.abc import Iterable

from dp_lora.errors import InputError

RANK_SCHEDULES = ("constant", "linear", "cosine")
BLOCKS = {"down_blocks": 1, "mid_block": 2, "up_blocks": 3}
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")


def layer_ranks(n: int, schedule: str, first: int, last: int | None) -> list[int]:
    """Ranks of `n` layers in order of depth, each at least 1.

    "constant": `first` everywhere. "linear" and "cosine": from `first` in the first layer to `last` in the last one, on
    a straight line or on half a cosine over the layers' numbers, rounded. Raises InputError for other names, and for a
    schedule that lacks its `last`.
    """
    if schedule not in RANK_SCHEDULES:
        raise InputError(f"lora.rank_schedule={schedule}: must be one of {', '.join(RANK_SCHEDULES)}")
    if schedule == "constant":
        return [first] * n
    if last is None:
        raise InputError(f"lora.rank_schedule={schedule}: needs lora.rank_last, the rank of the last layer")
    depths = [layer / max(1, n - 1) for layer in range(n)]
    shares = depths if schedule == "linear" else [(1 - math.cos(math.pi * depth)) / 2 for depth in depths]
    return [round(first + (last - first) * share) for share in shares]


def in_order_of_depth(names: Iterable[str]) -> list[str]:
    """Module names of a diffusers UNet as a picture meets them: down, middle, up, and within an attention q, k, v, out.

    The same whatever the order of `names`: that of a network's modules, or of a file.
    """
    return sorted(names, key=lambda name: (BLOCKS.get(name.split(".")[0], 0), [*map(_place, name.split("."))]))


def _place(part: str) -> tuple[int, str]:
    """Sort key of a part of a module's name: numbers by size, the projections of an attention by PROJECTIONS."""
    if part in PROJECTIONS:
        return PROJECTIONS.index(part), ""
    return (int(part), "") if part.isdigit() else (0, part)
