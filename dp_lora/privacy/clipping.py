"""One unit, one norm, one clip. All of it in float64, whatever the gradients are.

Flat clipping scales a gradient g by min(1, C / norm), automatic clipping (Bu et al., NeurIPS 2023) by
C / (norm + STABILITY). Claim: whatever g is, the scaled gradient has norm at most C, up to the last bits. Proof, for
automatic clipping:
(1) This norm is C * norm / (norm + STABILITY), and norm < norm + STABILITY. Where norm is 0 it is 0, as STABILITY > 0.
(2) In float64 the norm is off by at most (m + 3) * 2^-53 of itself for m numbers, as that of flat clipping is, and sum,
    quotient and product by 2^-53 each. Where norm is above 2^53 * STABILITY the sum may round to norm: then the factor
    is C / norm, flat clipping's own. So each bound on rounding in step.py (5) holds for both.
(3) Squares are off by at most 2^-1075 where they are too small for float64, so that the true norm may be larger than
    the computed one by sqrt(m) * 2^-537: against STABILITY that is nothing (below 2^-500 C for m <= 2^60).
(4) A norm that is inf or NaN counts as a gradient of zero.
(5) The kernels' rounding in a small gradient is scaled by at most C / STABILITY; flat clipping scales it by at most 1.
    The assumption of step.py (5 b) is of the same kind, with STABILITY in the place of C.
So one unit moves the sum by at most C either way: the sensitivity, the noise and epsilon are the same. But under
automatic clipping a small gradient counts as much as a large one, so that C is no setting any more: it scales sum and
noise alike, and Adam does not see it.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dp_lora.privacy.plan import AUTOMATIC, FLAT

STABILITY = 0.01  # automatic clipping adds it to a norm: the authors' own value, chosen on no data of ours


def unit_norms(gradients: Mapping[str, Tensor]) -> Tensor:
    """L2 norm (U,), float64, of each unit's gradient over all tensors together; each tensor is (U, *shape).

    Guarantee: one norm per unit, of this unit's gradient alone, NaN or inf where that holds a NaN or an inf.
    """
    squares = [gradient.detach().flatten(1).double().square().sum(1) for gradient in gradients.values()]
    return torch.stack(squares).sum(0).sqrt()


def clip_factors(norms: Tensor, max_grad_norm: float, clipping: str = FLAT) -> Tensor:
    """Factors (U,) that scale gradients with norms (U,) >= 0: 0 for a norm that is inf or NaN.

    Flat: min(1, max_grad_norm / norm), and 1 for norm 0. Automatic: max_grad_norm / (norm + STABILITY). Without a
    bound (max_grad_norm inf) both are 1.

    Guarantee: factor times norm is at most max_grad_norm, up to the last bit, where the factor is not 0.
    """
    factors = torch.ones_like(norms)
    if max_grad_norm != math.inf and clipping == AUTOMATIC:
        factors = max_grad_norm / (norms + STABILITY)
    elif max_grad_norm != math.inf:
        factors = (max_grad_norm / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max(1.0)
    return torch.where(norms.isfinite(), factors, torch.zeros_like(factors))


def clipped_sum(
    gradients: Mapping[str, Tensor], max_grad_norm: float, clipping: str = FLAT
) -> tuple[dict[str, Tensor], Tensor]:
    """Sum, float64, over units of gradients (U, *shape), each scaled to norm at most `max_grad_norm`; the norms (U,).

    Refused gradients (factor 0) are set to zero in place.

    Guarantee: adding or removing one unit moves the sum by at most max_grad_norm in L2 over all tensors together,
    whatever its gradient is: one with an inf or a NaN counts as zero. Up to float64 rounding (step.py).
    """
    norms = unit_norms(gradients)
    factors = clip_factors(norms, max_grad_norm, clipping)
    refused = (factors == 0).nonzero().squeeze(1)
    total = {}
    for name, gradient in gradients.items():
        # 0 * NaN is NaN, so a refused gradient is replaced, not scaled
        gradient.index_fill_(0, refused, 0.0)
        total[name] = torch.einsum("u...,u->...", gradient.double(), factors)
    return total, norms
