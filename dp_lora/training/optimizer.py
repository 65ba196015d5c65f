"""AdamW that subtracts the noise's known variance from its second moment (DP-AdamBC, Tang 2024).

Adam divides the mean of a coordinate's gradients, m, by the root of the mean of their squares, v. Noise of variance
`variance` adds as much to v, in expectation, and nothing to m: where it outweighs the gradient, Adam's steps shrink by
that ratio. v - variance is unbiased for the square of the gradient without noise. It may be near 0 or below by chance,
so a floor bounds it.

Privacy: post-processing. The noisy sum was released before; the variance, (noise_multiplier * max_grad_norm /
expected_batch)^2, and the floor are public numbers. Noise, clip and ledger do not depend on it.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dp_lora.privacy.plan import PrivacyPlan


def noise_variance(plan: PrivacyPlan) -> float:
    """Variance of the noise in each coordinate of `step.mean_gradient`, the same in all steps; 0 without privacy."""
    return (plan.noise_multiplier * plan.max_grad_norm / plan.expected_batch) ** 2 if plan.private else 0.0


def debiased(squares: Tensor, beta: float, step: int, variance: float, floor: float) -> Tensor:
    """Adam's mean of squares after `step` steps, 1 or more, without the noise's share; at least floor * variance.

    `squares` is the optimizer's sum, which began at 0: its own bias is corrected first, for only then does the noise
    add just `variance` to it in expectation, in the first step as in the last.
    """
    return (squares / (1 - beta**step) - variance).clamp_min(floor * variance)


class NoiseDebiasedAdamW(torch.optim.AdamW):
    """torch's AdamW with `debiased` in the place of the second moment; state and settings are torch's own.

    Without noise (variance 0) it is AdamW. All groups have one noise variance, whatever their learning rates: the noise
    is one Gaussian over all tensors.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], variance: float, floor: float, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self.variance, self.floor = variance, floor

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step; every parameter has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._step(parameter, parameter.grad, group)

    def _step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        taken = int(state["step"])
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        spread = debiased(state["exp_avg_sq"], beta2, taken, self.variance, self.floor).sqrt_().add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(state["exp_avg"], spread, value=-group["lr"] / (1 - beta1**taken))
