"""The noise that hides one unit."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dp_lora.errors import InputError


def require_wide(tensors: Mapping[str, Tensor]) -> None:
    """Raise InputError, with the tensor's name, for a tensor narrower than float32.

    Guarantee: no sum and no noise is computed in half precision, where one unit moves a sum by up to 10 times its clip
    and the noise has 8 bits.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"{name}: is {tensor.dtype}; whatever is trained, summed or hidden must be float32 or wider"
            )


def add_noise(total: Mapping[str, Tensor], std: float, generator: np.random.Generator) -> dict[str, Tensor]:
    """`total` plus std * N(0, 1), drawn for each element of each tensor, in the order of the names.

    Drawn on the CPU in float64 whatever the device, so that one seed gives one noise everywhere, and rounded to the
    tensor's own type, float32 or float64 (else InputError).

    Guarantee: if one unit moves `total` by at most std / sigma in L2, the result is a Gaussian mechanism with noise
    multiplier sigma, up to floating-point rounding.
    """
    require_wide(total)
    noisy = {}
    for name in sorted(total):
        noise = torch.from_numpy(generator.standard_normal(tuple(total[name].shape)) * std)
        noisy[name] = total[name] + noise.to(total[name].device, total[name].dtype)
    return noisy
