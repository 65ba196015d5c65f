"""The one moving average of weights over steps, and the weight that the newest ones get.

That weight is a function of the step alone, so an interrupted run continues exactly like an unbroken one.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def update_average(average: Iterable[Tensor], current: Iterable[Tensor], weight: float) -> None:
    """Move `average` by the share `weight`, in [0, 1], towards `current`, in place; tensors pair up in their order."""
    torch._foreach_lerp_(list(average), list(current), weight)


def growing_weight(step: int, decay: float) -> float:
    """1 - decay, where the decay grows as (1 + s) / (10 + s), s = step + 1, until it reaches `decay`.

    As in latent diffusion: the random start is forgotten.
    """
    return 1 - min(decay, (step + 2) / (step + 11))


def tail_weight(step: int, total: int, share: float) -> float:
    """Weight of a step's value, step in [0, total), in a running mean over the last `share` of the steps, at least one.

    Before them it is 1: the mean is the newest value.
    """
    first = total - max(1, round(share * total))
    return 1 / max(1, step - first + 1)
