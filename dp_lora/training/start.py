"""Checks of a base before the first step, a pipeline's on dummies, and its weights that stay untrained."""

import numpy as np
import torch
from torch import Tensor

from dp_lora.config.schema import Config
from dp_lora.data.conditions import Captions
from dp_lora.diffusion import Flow, process_of
from dp_lora.errors import InputError
from dp_lora.models.adapters import lora_parameters
from dp_lora.models.families import TEXT, Conditions
from dp_lora.models.folder import Model

APART = 1e-4  # share of the largest value by which another row's last bits may move


def dummy_captions(model: Model, size: int, pictures: int) -> Captions:
    """Public random conditions, one for each of `pictures`' dummies, in the shapes of encoded captions."""
    rows = max(1, pictures)
    return Captions(_dummy_conditions(model, size, rows), [[number] for number in range(rows)])


def _dummy_conditions(model: Model, size: int, rows: int) -> Conditions:
    generator = np.random.default_rng(0)
    found = {}
    for name, blank in model.family.blank(model.denoiser.config, size).items():
        shape = (rows, *blank.shape[1:])
        drawn = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
        found[name] = drawn if name in TEXT else blank.expand(shape).clone()
    return found


def _dummy_rows(config: Config, model: Model, rows: int, device: torch.device) -> tuple[Tensor, Tensor, Conditions]:
    generator = torch.Generator().manual_seed(0)
    shape = (rows, *model.latent_shape(config.data.size))
    process = process_of(model.scheduler, "model.base")
    middle = 500 if process.times is np.int64 else 0.5
    t = torch.from_numpy(np.full(rows, middle, process.times)).to(device)
    conditions = _dummy_conditions(model, config.data.size, rows)
    x_t = torch.randn(shape, generator=generator).to(device)
    return x_t, t, {name: tensor.to(device) for name, tensor in conditions.items()}


def require_finite(config: Config, model: Model) -> None:
    """InputError where a weight of the denoiser or of the class table is NaN or infinite: each gradient would be NaN,
    which the clip counts as 0, so that all steps would be spent on noise alone."""
    weights = dict(model.denoiser.state_dict())
    if model.class_embedding is not None:
        weights["class_embedding"] = model.class_embedding
    broken = next((name for name, weight in weights.items() if not bool(torch.isfinite(weight).all())), None)
    if broken is not None:
        raise InputError(
            f"model.base={config.model.base}: its weights hold NaN or infinity ({broken}); get or make it again, or "
            "name another base"
        )


def require_its_process(model: Model) -> None:
    """InputError for a scheduler of a process that cannot be trained, or that is not the family's: its denoiser would
    be given times on another scale."""
    process = process_of(model.scheduler, "model.base")
    if isinstance(process, Flow) != model.family.flow:
        trained = "flow matching" if model.family.flow else "noise"
        raise InputError(
            f"model.base: a {model.family.pipeline} is trained by {trained} here, but its "
            f"{type(model.scheduler).__name__} is of another process; name another base"
        )


@torch.no_grad()
def require_rows_apart(config: Config, model: Model, device: torch.device) -> None:
    """InputError where a row's output moves with another row's picture or caption: one unit would then enter another's
    gradient, and no clip would bound its effect. Reads dummies alone."""
    x_t, t, conditions = _dummy_rows(config, model, 3, device)
    before = model.predict(x_t, t, conditions)
    x_t[0] += 1
    for name in TEXT:
        if name in conditions:
            conditions[name][0] *= -1
    after = model.predict(x_t, t, conditions)
    moved = (after - before).abs().flatten(1).amax(1) / before.abs().max()
    if not bool((moved[1:] <= APART).all()) or not bool(moved[0] > APART):
        raise InputError(
            "model.base: a row of this base changes with another row of its batch, or not with its own: per-unit "
            "gradients would be wrong; it cannot be fine-tuned privately"
        )


def dead_weights(config: Config, model: Model, device: torch.device) -> frozenset[str]:
    """Names of LoRA weights whose factor B gets a gradient of exactly 0 on dummies: trained, they would be noise alone.

    Example: the context's queries in the last block of some transformers, whose result nothing reads.
    """
    factors = lora_parameters(model.denoiser, "B")
    for weight in factors.values():
        weight.requires_grad_()
    x_t, t, conditions = _dummy_rows(config, model, 1, device)
    loss = model.predict(x_t, t, conditions).square().mean()
    gradients = torch.autograd.grad(loss, list(factors.values()), allow_unused=True)
    for weight in factors.values():
        weight.requires_grad_(False)
    dead = [name for name, found in zip(factors, gradients, strict=True) if found is None or not bool(found.any())]
    return frozenset(f"{name.removesuffix('B')}{factor}" for name in dead for factor in "AB")
