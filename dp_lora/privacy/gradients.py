"""Per-unit gradients without hooks: every part of a unit has its own copy of the trained weights.

A row is one (unit, picture, noise draw). A part is a fixed run of rows of one picture: all of its k draws, or equal
shares of them where k rows are too many for one micro-batch. Each part is computed with a copy of its own, so that
plain autograd's gradient for the copy is that part's gradient: the same number as a backward pass over this part alone.

The other units that take part move a part to another place or another micro-batch. They change nothing else: a part's
own rows, their number and their order are its unit's alone, and all micro-batches of a step have one shape.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NOBODY = -1  # the picture of a padded row


@dataclass(frozen=True)
class Rows:
    """Rows of one micro-batch: `copies` parts of `rows_per_copy` rows each, ordered by unit, then padding."""

    slot: Tensor  # (R,) int64: position of the row's copy, 0 .. copies - 1, ascending
    picture: Tensor  # (R,) int64: position of the row's picture in the private data, NOBODY for a padded row
    weight: Tensor  # (R,) float32: 1 / (pictures of the unit * k), so that a unit's loss is a mean; 0 for a padded row
    copies: int
    rows_per_copy: int
    units: list[int]  # of each part that is no padding: position of its unit among those drawn, ascending
    last_continues: bool  # the last unit continues in the next micro-batch


# copies {name: (copies, *shape)}, rows -> loss of each row (R,); a padded row's loss must be finite and read no picture
LossFunction = Callable[[Mapping[str, Tensor], Rows], Tensor]


def rows_per_part(k: int, physical_batch_size: int) -> int:
    """Rows of one part: k where these fit into a micro-batch, else the largest divisor of k that does.

    Guarantee: a function of public numbers; a picture's rows are cut the same way whoever takes part.
    """
    return next(rows for rows in range(min(k, physical_batch_size), 0, -1) if k % rows == 0)


def rows_at_once(k: int, physical_batch_size: int) -> int:
    """Rows of a micro-batch: as many whole parts as fit into `physical_batch_size`, a multiple of k where k fits.

    Guarantee: that of `rows_per_part`.
    """
    part = rows_per_part(k, physical_batch_size)
    return physical_batch_size // part * part


def micro_batches(
    units: Sequence[Sequence[int]], k: int, physical_batch_size: int, device: torch.device
) -> Iterator[Rows]:
    """Lay the parts of the drawn units (lists of pictures) into micro-batches of `rows_at_once` rows.

    A unit has k rows per picture, one after the other, and may span several micro-batches. The last micro-batch is
    padded to the shape of the others.

    Guarantee: every unit has all of its rows, once, with weights that add up to 1, and no part holds rows of two units
    or padded rows; a unit that spans micro-batches is marked, so that it can be added up before its one clip.
    """
    each = rows_per_part(k, physical_batch_size)
    copies = physical_batch_size // each
    parts = [
        (position, picture, 1.0 / (len(unit) * k))
        for position, unit in enumerate(units)
        for picture in unit
        for _ in range(k // each)
    ]
    slot = torch.arange(copies, device=device).repeat_interleave(each)
    for start in range(0, len(parts), copies):
        own = parts[start : start + copies]
        padded = own + [(NOBODY, NOBODY, 0.0)] * (copies - len(own))
        following = parts[start + copies][0] if start + copies < len(parts) else NOBODY
        yield Rows(
            slot=slot,
            picture=torch.tensor([picture for _, picture, _ in padded], device=device).repeat_interleave(each),
            weight=torch.tensor([weight for _, _, weight in padded], device=device).repeat_interleave(each),
            copies=copies,
            rows_per_copy=each,
            units=[position for position, _, _ in own],
            last_continues=own[-1][0] == following,
        )


def part_gradients(
    loss: LossFunction, parameters: Mapping[str, Tensor], rows: Rows
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradient (P, *shape) of each part's share of its unit's loss, and these shares (P,); P parts, without padding.

    Guarantee: a part's gradient depends on its own picture, draws and public weights only, up to rounding (step.py).
    """
    copies = {
        # expanded, not repeated: a copy takes no memory, and its gradient is a tensor of its own
        name: parameter.detach().expand(rows.copies, *parameter.shape).requires_grad_()
        for name, parameter in parameters.items()
    }
    weighted = loss(copies, rows) * rows.weight
    gradients = torch.autograd.grad(weighted.sum(), list(copies.values()), allow_unused=True)
    losses = weighted.detach().float().view(rows.copies, rows.rows_per_copy).sum(1)
    own = len(rows.units)
    return {
        name: (torch.zeros_like(copy) if gradient is None else gradient)[:own]
        for (name, copy), gradient in zip(copies.items(), gradients, strict=True)
    }, losses[:own]
