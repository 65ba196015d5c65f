"""Operations of matrix products and convolutions, counted on networks without weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dp_lora.models.autoencoder import decode, encode, shrinks
from dp_lora.models.families import CLASSES, Family
from dp_lora.models.meta import meta_row
from dp_lora.models.operations import Operations


def count_operations(denoiser: Any, vae: Any, family: Family = CLASSES, size: int | None = None) -> Operations:
    """Of frozen networks on the meta device (`meta_networks`, `meta_copies`), for pictures of `size` pixels.

    `size` None: the autoencoder's own. Takes seconds at any width.
    """
    denoiser.requires_grad_(False)
    size = size or vae.config["sample_size"]
    side = size // shrinks(vae)
    latents, timestep, conditions = meta_row(denoiser, family, size, (vae.config["latent_channels"], side, side))
    pixels = torch.empty(1, vae.config["in_channels"], size, size, device="meta")

    def predict() -> Tensor:
        return family.predict(denoiser, latents, timestep, conditions)

    forward = _flops(torch.no_grad()(predict))
    if family.of_classes:
        conditions["context"].requires_grad_()  # only now: a view of it would count as trained where nothing is
    tokens: dict[str, int] = {}
    hooks = [
        module.register_forward_hook(_noting(name, tokens))
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Linear)
    ]
    both = _flops(lambda: predict().square().mean().backward())
    for hook in hooks:
        hook.remove()
    return Operations(
        forward=forward,
        backward=both - forward,
        encode=_flops(torch.no_grad()(lambda: encode(vae, pixels))),
        decode=_flops(torch.no_grad()(lambda: decode(vae, latents))),
        tokens=tokens,
    )


def _noting(name: str, tokens: dict[str, int]) -> Callable[[nn.Module, tuple, Tensor], None]:
    def note(module: nn.Module, _: tuple, output: Tensor) -> None:
        tokens[name] = output.numel() // output.shape[-1]
        if "attn" in name and not output.requires_grad:
            output.requires_grad_()  # an adapter on this layer needs the gradient to it

    return note


def _flops(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()
