"""State of a private fine-tuning: parameters, their optimizer, and the average of the weights, which is released.

Privacy: post-processing. All of it sees the data through the noisy sums alone; public numbers decide which steps are
averaged, and with which weights.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from dp_lora.config.schema import Train
from dp_lora.learning_rate import lr_factor, noise_scale
from dp_lora.models.adapters import EMBEDDING
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.training.moving_average import tail_weight, update_average
from dp_lora.training.optimizer import NoiseDebiasedAdamW, noise_variance


class Averaged:
    """Parameters, their AdamW state and their average over steps: everything that a checkpoint holds."""

    def __init__(self, train: Train, parameters: Mapping[str, Tensor], plan: PrivacyPlan) -> None:
        self.train, self.parameters, self.steps = train, parameters, plan.steps
        self.average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        scale = noise_scale(plan.noise_multiplier, train.lr_noise_exponent)
        self.rates = {name: scale * (train.embedding_lr if name == EMBEDDING else train.lr) for name in parameters}
        self.optimizer = _optimizer(train, parameters, plan)

    def step(self, gradient: Mapping[str, Tensor], step: int) -> None:
        """The optimizer's step number `step`, from 0, on the averaged noisy sum; then the average of the weights."""
        factor = lr_factor(self.train.lr_schedule, step, self.steps, final=self.train.lr_final)
        for group, (name, parameter) in zip(self.optimizer.param_groups, self.parameters.items(), strict=True):
            parameter.grad = gradient[name]
            group["lr"] = self.rates[name] * factor
        self.optimizer.step()
        share = self.train.tail_average
        weight = 1 - self.train.ema_decay if share is None else tail_weight(step, self.steps, share)
        update_average(self.average.values(), self.parameters.values(), weight)

    def tensors(self) -> dict[str, Tensor]:
        state = {}
        for name, parameter in self.parameters.items():
            state[f"parameter/{name}"] = parameter
            state[f"average/{name}"] = self.average[name]
            for key, value in self.optimizer.state[parameter].items():
                state[f"adam.{key}/{name}"] = value
        return state

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(state[f"parameter/{name}"])
            self.average[name].copy_(state[f"average/{name}"])
            self.optimizer.state[parameter] = {
                key.removeprefix("adam.").removesuffix(f"/{name}"): value.to("cpu" if "step" in key else value.device)
                for key, value in state.items()
                if key.startswith("adam.") and key.endswith(f"/{name}")
            }

    @contextmanager
    def released(self) -> Iterator[None]:
        """Inside, the parameters hold their average: the weights that are released."""
        own = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.average[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(own[name])


def _optimizer(train: Train, parameters: Mapping[str, Tensor], plan: PrivacyPlan) -> torch.optim.AdamW:
    """The optimizer, a group for each of `parameters` in their order; `Averaged.step` sets their learning rates."""
    groups = [{"params": [parameter]} for parameter in parameters.values()]
    betas, weight_decay = (train.betas[0], train.betas[1]), train.weight_decay
    if train.noise_debias is None:
        return torch.optim.AdamW(groups, betas=betas, weight_decay=weight_decay)
    return NoiseDebiasedAdamW(groups, noise_variance(plan), train.noise_debias, betas=betas, weight_decay=weight_decay)
