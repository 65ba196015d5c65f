"""The memory of a row of the private step, counted on networks without weights.

Attention is counted as the kernels of a GPU do it, which keep no matrix of scores. Fragments and the kernels' own room
are left out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dp_lora.config.schema import Config, Lora
from dp_lora.models.adapters import add_lora, lora_parameters, unit_copies
from dp_lora.models.autoencoder import shrinks
from dp_lora.models.counted_rows import RowMemory, precision_of
from dp_lora.models.families import Family
from dp_lora.models.meta import meta_networks, meta_row


def count_row(config: Config, base: Path, family: Family) -> RowMemory:
    """Of the base in `base`, or of the one that `config` would make, with the config's LoRA, pictures and precision."""
    denoiser, vae = meta_networks(config, base)
    side = config.data.size // shrinks(vae)
    latent = (vae.config["latent_channels"], side, side)
    precision = getattr(torch, precision_of(config))
    return row_memory(denoiser, family, config.lora, config.data.size, latent, precision)


class _Flash(torch.autograd.Function):
    """Attention by its shapes: it keeps the tensors that a GPU's kernels keep."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError("counted, never computed")


@contextmanager
def _flash() -> Iterator[None]:
    functional: Any = torch.nn.functional
    usual = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = lambda query, key, value, *_, **__: _Flash.apply(query, key, value)
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = usual


class _Kept:
    """Bytes of distinct tensors that autograd keeps; those of `own` exist anyway and do not count."""

    def __init__(self, own: set[int]) -> None:
        self._seen, self._alive, self.bytes = set(own), list[Tensor](), 0

    def note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._alive.append(tensor)  # keep it alive: another tensor could reuse a freed address
            self.bytes += storage.nbytes()
        return tensor


def row_memory(
    denoiser: Any, family: Family, lora: Lora, size: int, latent: tuple[int, int, int], precision: torch.dtype
) -> RowMemory:
    """Of a denoiser on the meta device (changed in place) that is held in `precision`, for pictures of `size` pixels.

    `latent` is (c, h, w). Takes seconds at any width.
    """
    torch.nn.Module.to(denoiser.eval(), precision)  # diffusers' own warns of parts that none has
    frozen = sum(tensor.nbytes for tensor in [*denoiser.parameters(), *denoiser.buffers()])
    add_lora(denoiser, lora, torch.Generator(), family)
    denoiser.requires_grad_(False)
    copies = {
        name: weight.detach().expand(1, *weight.shape).requires_grad_()
        for name, weight in lora_parameters(denoiser, lora.train).items()
    }
    lying = [*denoiser.parameters(), *denoiser.buffers(), *copies.values()]
    kept = _Kept({tensor.untyped_storage()._cdata for tensor in lying})
    given, blocks = _Kept(set()), [0]

    def counted(block: Any, *arguments: Any) -> Any:
        for argument in arguments:
            if torch.is_tensor(argument):
                given.note(argument)
        before = kept.bytes
        result = block(*arguments)
        blocks.append(kept.bytes - before)
        return result

    denoiser.enable_gradient_checkpointing(counted)
    x_t, t, conditions = meta_row(denoiser, family, size, latent, precision)
    if family.of_classes:
        conditions["context"].requires_grad_()
    with _flash(), unit_copies(denoiser, copies, 1), saved_tensors_hooks(kept.note, lambda tensor: tensor):
        family.predict(denoiser, x_t, t, conditions)
    gradient = sum(copy.nbytes for copy in copies.values())
    outside = kept.bytes - sum(blocks)
    return RowMemory(kept.bytes + gradient, outside + given.bytes + max(blocks) + gradient, frozen)
