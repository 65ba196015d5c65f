"""One unit, one norm, one clip. All of it in float64, whatever the gradients are."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def unit_norms(gradients: Mapping[str, Tensor]) -> Tensor:
    """L2 norm (U,), float64, of each unit's gradient over all tensors together; each tensor is (U, *shape).

    Guarantee: one norm per unit, of this unit's gradient alone, NaN or inf where that holds a NaN or an inf.
    """
    squares = [gradient.detach().flatten(1).double().square().sum(1) for gradient in gradients.values()]
    return torch.stack(squares).sum(0).sqrt()


def clip_factors(norms: Tensor, max_grad_norm: float) -> Tensor:
    """min(1, max_grad_norm / norm) for norms (U,) >= 0; 1 for norm 0; 0 for a norm that is inf or NaN.

    Guarantee: factor times norm is at most max_grad_norm, up to the last bit, where the factor is not 0.
    """
    factors = torch.ones_like(norms)
    if max_grad_norm != math.inf:
        factors = (max_grad_norm / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max(1.0)
    return torch.where(norms.isfinite(), factors, torch.zeros_like(factors))


def clipped_sum(gradients: Mapping[str, Tensor], max_grad_norm: float) -> tuple[dict[str, Tensor], Tensor]:
    """Sum, float64, over units of gradients (U, *shape), each scaled to norm at most `max_grad_norm`; the norms (U,).

    Gradients that are refused are set to zero in place.

    Guarantee: adding or removing one unit moves the sum by at most max_grad_norm in L2 over all tensors together,
    whatever its gradient is: one with an inf or a NaN counts as zero. Up to float64 rounding (step.py).
    """
    norms = unit_norms(gradients)
    factors = clip_factors(norms, max_grad_norm)
    refused = (factors == 0).nonzero().squeeze(1)
    total = {}
    for name, gradient in gradients.items():
        # 0 * NaN is NaN, so a refused gradient is replaced, not scaled
        gradient.index_fill_(0, refused, 0.0)
        total[name] = torch.einsum("u...,u->...", gradient.double(), factors)
    return total, norms
