"""Per-unit gradients without hooks: every unit has its own copy of the trained weights.

A row is one (unit, picture, noise draw). Each row is computed with its unit's copy, so that plain autograd's gradient
for the copy is that unit's gradient: the same number as a backward pass over this unit alone.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Rows of one micro-batch, ordered by unit."""

    slot: Tensor  # (R,) int64: position of the row's copy, 0 .. n_units - 1, ascending
    picture: Tensor  # (R,) int64: position of the row's picture in the private data
    weight: Tensor  # (R,) float32: 1 / (pictures of the unit * k), so that a unit's loss is a mean over its rows
    n_units: int
    rows_per_unit: int | None  # where all units have the same number of rows here
    first_continues: bool  # the first unit began in the micro-batch before
    last_continues: bool  # the last unit goes on in the micro-batch after


# copies {name: (U, *shape)}, rows -> loss of each row (R,)
LossFunction = Callable[[Mapping[str, Tensor], Rows], Tensor]


def micro_batches(
    units: Sequence[Sequence[int]], k: int, physical_batch_size: int, device: torch.device
) -> Iterator[Rows]:
    """Cut the rows of the drawn units (lists of pictures) into micro-batches of at most `physical_batch_size` rows.

    A unit has k rows per picture, one after the other, and may span several micro-batches.

    Guarantee: every unit has all of its rows, once, with weights that add up to 1, and no row is two units'; a unit
    that spans micro-batches is marked in each of them, so that it can be added up before its one clip.
    """
    unit_of, pictures, weights = [], [], []
    for position, unit in enumerate(units):
        rows = len(unit) * k
        unit_of += [position] * rows
        pictures += [picture for picture in unit for _ in range(k)]
        weights += [1.0 / rows] * rows
    for start in range(0, len(unit_of), physical_batch_size):
        stop = min(start + physical_batch_size, len(unit_of))
        first, last = unit_of[start], unit_of[stop - 1]
        counts = set(Counter(unit_of[start:stop]).values())
        yield Rows(
            slot=torch.tensor(unit_of[start:stop], device=device) - first,
            picture=torch.tensor(pictures[start:stop], device=device),
            weight=torch.tensor(weights[start:stop], device=device),
            n_units=last - first + 1,
            rows_per_unit=counts.pop() if len(counts) == 1 else None,
            first_continues=start > 0 and unit_of[start - 1] == first,
            last_continues=stop < len(unit_of) and unit_of[stop] == last,
        )


def unit_gradients(
    loss: LossFunction, parameters: Mapping[str, Tensor], rows: Rows
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradient (U, *shape) of each unit's part of its loss in these rows, and the weighted loss of each unit (U,).

    Guarantee: unit u's gradient depends on u's own pictures and draws only, up to rounding (step.py).
    """
    copies = {
        # expanded, not repeated: a copy takes no memory, and its gradient is a tensor of its own
        name: parameter.detach().expand(rows.n_units, *parameter.shape).requires_grad_()
        for name, parameter in parameters.items()
    }
    weighted = loss(copies, rows) * rows.weight
    gradients = torch.autograd.grad(weighted.sum(), list(copies.values()), allow_unused=True)
    losses = torch.zeros(rows.n_units, device=weighted.device).index_add_(0, rows.slot, weighted.detach().float())
    return {
        name: torch.zeros_like(copy) if gradient is None else gradient
        for (name, copy), gradient in zip(copies.items(), gradients, strict=True)
    }, losses
