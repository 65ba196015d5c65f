"""Canaries beside the private pictures of a fine-tuning: an audit of the whole of it, for the operator alone.

A canary is a unit with made-up pictures. Its loss pulls at one coordinate of its own, in a tensor that is trained
beside the adapter's; its rows run through the network like all others. So draw, micro-batches, ranks, clip, noise,
divisor, optimizer and ledger are those of the fine-tuning. The trained weights are no result: none of them is kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dp_lora.config.schema import Config
from dp_lora.data.conditions import AnyCaptions
from dp_lora.privacy.audit_canaries import HUGE, PERSON
from dp_lora.privacy.clipping import STABILITY
from dp_lora.privacy.gradients import LossFunction, Rows
from dp_lora.privacy.randomness import ItemStreams
from dp_lora.privacy.sums import LossFactory

TENSOR = "canaries"  # name of the tensor that the canaries pull at


@dataclass(frozen=True)
class Canaries:
    """Canary i is picture `pictures` + i; `coins` (m,) say which are in. `seen` keeps the canaries' measurements."""

    pictures: int  # number of private pictures, which come first
    coins: NDArray[np.bool_]
    max_grad_norm: float
    person: bool  # whether each has several pictures
    seen: list[NDArray[np.float64]] = field(default_factory=list, compare=False)

    @classmethod
    def beside(cls, pictures: int, coins: NDArray[np.bool_], config: Config) -> "Canaries":
        return cls(pictures, coins, config.privacy.max_grad_norm, config.privacy.unit == "person")

    @property
    def units(self) -> list[list[int]]:
        """The pictures of each canary that is in; a person is one picture, several times."""
        return [[self.pictures + int(i)] * (PERSON if self.person else 1) for i in np.flatnonzero(self.coins)]

    def latents(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """The private latents (N, c, h, w), and as many of zeros as there are canaries."""
        return np.concatenate([latents, np.zeros((len(self.coins), *latents.shape[1:]), np.float32)])

    def labels(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.concatenate([labels, np.zeros(len(self.coins), labels.dtype)])

    def captions(self, captions: AnyCaptions | None) -> AnyCaptions | None:
        return None if captions is None else replace(captions, of=[*captions.of, *[[0]] * len(self.coins)])

    def parameters(self, device: torch.device) -> dict[str, Tensor]:
        """The tensor that the canaries pull at, zeros at the start."""
        return {TENSOR: torch.zeros(len(self.coins), device=device, requires_grad=True)}

    def loss_factory(self, others: LossFactory) -> LossFactory:
        """Loss of rows: a canary's rows pull at its own coordinate; all other rows have the network's loss."""
        strength = HUGE * max(self.max_grad_norm, STABILITY)

        def factory(draws: ItemStreams) -> LossFunction:
            network = others(draws)

            def loss(copies: Mapping[str, Tensor], rows: Rows) -> Tensor:
                found = network(copies, rows)
                canary = (rows.picture - self.pictures).clamp(0, len(self.coins) - 1)
                pulled = copies[TENSOR][rows.slot].gather(1, canary[:, None])[:, 0]
                return torch.where(rows.picture >= self.pictures, strength * pulled, found)

            return loss

        return factory

    def saw(self, total: Mapping[str, Tensor]) -> None:
        """Keep the canaries' coordinates of a step's noisy sum, in units of the clip."""
        self.seen.append(total[TENSOR].double().cpu().numpy() / self.max_grad_norm)
