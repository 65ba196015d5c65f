"""The noise that hides one unit."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def add_noise(total: Mapping[str, Tensor], std: float, generator: np.random.Generator) -> dict[str, Tensor]:
    """`total` plus std * N(0, 1), drawn for each element of each tensor, in the order of the names.

    Drawn on the CPU in float64 whatever the device, so that one seed gives one noise everywhere, and rounded to the
    tensor's own type.

    Guarantee: if one unit moves `total` by at most std / sigma in L2, the result is a Gaussian mechanism with noise
    multiplier sigma, up to floating-point rounding.
    """
    noisy = {}
    for name in sorted(total):
        noise = torch.from_numpy(generator.standard_normal(tuple(total[name].shape)) * std)
        noisy[name] = total[name] + noise.to(total[name].device, total[name].dtype)
    return noisy
