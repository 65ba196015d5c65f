"""The private step on your own torch model: it needs only the loss of one row."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, vmap

from dp_lora.privacy.gradients import NOBODY, LossFunction, Rows
from dp_lora.privacy.randomness import ItemStreams
from dp_lora.privacy.sums import LossFactory

Draw = Callable[[np.random.Generator], Tensor]  # one draw of a row; every call gives the same shape
RowLoss = Callable[..., Tensor]  # weights {name: (*shape)}, position in the data (), the row's draw -> loss ()


def each_row(row_loss: RowLoss, draw: Draw | None = None) -> LossFactory:
    """The loss factory for `noisy_sum`, from the loss of one row: `row_loss(weights, position)`, a scalar.

    `weights` {name: (*shape)} belong to one copy (`torch.func.functional_call` runs a module with them), `position`
    () int64 is the example's position in the data. With `draw`, `row_loss` gets a third argument: the result of `draw`
    on the example's own numpy generator, anew for each of its k rows.

    Torch's vmap computes all rows at once. It refuses a `row_loss` that draws randomness itself (dropout) or changes
    buffers (batch norm), which would tie rows together.

    Guarantee: a row's loss depends on its own example, its own draw and its own copy of the weights; so (2) of step.py
    holds, as far as `row_loss` reads no example but that of `position`.
    """

    def factory(draws: ItemStreams) -> LossFunction:
        def loss(copies: Mapping[str, Tensor], rows: Rows) -> Tensor:
            shape = (rows.copies, rows.rows_per_copy)
            # a padded row's loss has weight 0, in a copy that holds padding alone: any example will do
            per_row = [rows.picture.clamp_min(0).view(shape)]
            if draw is not None:
                drawn = [draw(_generator(draws, picture)) for picture in rows.picture.tolist()]
                per_row.append(torch.stack(drawn).to(rows.picture.device).unflatten(0, shape))
            of_a_copy = vmap(row_loss, in_dims=(None, *(0 for _ in per_row)))
            return vmap(of_a_copy)(dict(copies), *per_row).flatten()

        return loss

    return factory


def _generator(draws: ItemStreams, picture: int) -> np.random.Generator:
    # a padded row moves no example's stream on
    return np.random.default_rng(0) if picture == NOBODY else draws[picture]
