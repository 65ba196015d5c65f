"""Shares of a learning rate: the one schedule over steps, and the share that noise leaves. Pure functions."""

import math


def lr_factor(schedule: str, step: int, total: int, warmup_steps: int = 0, final: float = 0.0) -> float:
    """Share of the learning rate at a step in [0, total), after a linear warm-up.

    "constant", or "cosine": half a cosine from 1 towards `final`.
    """
    factor = final + (1 - final) * 0.5 * (1 + math.cos(math.pi * step / total)) if schedule == "cosine" else 1.0
    return factor * min(1.0, (step + 1) / (warmup_steps + 1))


def noise_scale(noise_multiplier: float, exponent: float) -> float:
    """Share of the learning rate that is left under noise: max(1, noise_multiplier) ** -exponent, in (0, 1].

    A rule on public numbers alone. Adam divides by the gradient's scale, so noise does not shrink its steps: where
    noise dominates, the weights walk at random by lr a step, and the walk has to be kept short.
    """
    return max(1.0, noise_multiplier) ** -exponent
