"""Class-conditional latent diffusion, as `pretrain_ldm` and `import_base` make it: the class embedding is one token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dp_lora.models.families.family import Conditions, Family

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ClassConditional(Family):
    """A model folder of ours; no pipeline class of diffusers draws from it."""

    pipeline: str = ""
    # attn2's to_q and to_k get no gradient from a single context token: their adapters would be noise alone
    targets: tuple[str, ...] = (
        "attn1.to_q",
        "attn1.to_k",
        "attn1.to_v",
        "attn1.to_out.0",
        "attn2.to_v",
        "attn2.to_out.0",
    )
    by_pipeline: bool = False
    tokens: int = 1
    of_classes: bool = True

    def classes(self, config: Mapping[str, Any]) -> list[str]:
        """The classes that a pipeline's denoiser has rows for, by its config; a folder of ours states its own."""
        raise NotImplementedError

    def take_table(self, denoiser: Any, n_classes: int) -> Tensor:
        """Rows (n_classes + 1, dim) of a pipeline's class table, 'no class' last; the denoiser then takes such rows.

        Raises InputError for a denoiser whose table is not one.
        """
        raise NotImplementedError

    def put_table(self, denoiser: Any, rows: Tensor) -> None:
        """Undo `take_table`, with other rows: the stock layers again, `rows` (classes + 1, dim) in their table."""
        raise NotImplementedError

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        return denoiser(x_t, t, conditions["context"]).sample
