"""The processes (ranks) that work on one run, and what goes between them.

All of it goes over gloo in the order of the ranks, on a CPU and on a GPU alike: what is exchanged is as small as the
adapter, a rank that ends is noticed at once, and one order of additions gives one rounding.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from dp_lora.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")

GOES_ON = "ledger and checkpoints stand, and a direct call that is typed again goes on"


class RankLost(InputError):
    """Another rank has ended, or does not answer; the message names ranks alone, and may be recorded."""

    def __init__(self, message: str, public: str | None = None) -> None:
        super().__init__(message, message if public is None else public)


@dataclass(frozen=True)
class Team:
    """This process is `rank` of `size`; by default it is alone. All ranks call the same methods in the same order.

    Each method raises RankLost where another rank has ended, or has not answered for `timeout_minutes`.
    """

    rank: int = 0
    size: int = 1
    timeout_minutes: float = 0.0  # of the process group, as compute.rank_timeout_minutes has it
    group: Any = None  # of torch.distributed; None: the default one

    @property
    def first(self) -> bool:
        """Whether this rank draws, notes down, writes and prints; the others only compute their shares."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This rank's items; may be empty.

        Guarantee: every item is one rank's, and no item is two ranks'.
        """
        return list(items[self.rank :: self.size])

    def once(self, value: Any = None) -> Any:
        """The first rank's `value`, on all ranks; what the others give is not looked at."""
        if self.size == 1:
            return value
        box = [value]
        with self._lost_ranks():
            distributed.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` in the order of the ranks, on the first; on the others an empty list."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.first else None
        with self._lost_ranks():
            distributed.gather_object(value, values, dst=0, group=self.group)
        return values or []

    def map(self, function: Callable[[Item], Result], items: Sequence[Item] = ()) -> Iterator[Result]:
        """On the first rank function(item) of its `items`, in their order; the others get nothing.

        The ranks take an item each, the next ones when the first rank asks for more: it holds `size` results at most.
        """
        items = self.once(list(items))
        for start in range(0, len(items), self.size):
            own = [function(item) for item in self.share(items[start : start + self.size])]
            for results in self.gather(own):
                yield from results

    def copy(self, tensors: Mapping[str, Tensor]) -> None:
        """Give `tensors` of the other ranks, in place, the values of the first rank's."""
        if self.size == 1:
            return
        flat = _flat(tensors)
        with self._lost_ranks():
            distributed.broadcast(flat, src=0, group=self.group)
        if not self.first:
            with torch.no_grad():
                for tensor, value in zip(tensors.values(), _cut(flat, tensors), strict=True):
                    tensor.copy_(value)

    def sum(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On the first rank the sum of all ranks' tensors, added in the order of the ranks; on the others their own.

        Guarantee: each rank's tensors are added once, and no rank but the first gets another's.
        """
        if self.size == 1:
            return dict(tensors)
        flat = _flat(tensors)
        with self._lost_ranks():
            if self.first:
                self._add_in_turn(flat)
            else:
                distributed.send(flat, dst=0, group=self.group)
        return {
            name: value.to(tensor.device)
            for (name, tensor), value in zip(tensors.items(), _cut(flat, tensors), strict=True)
        }

    def _add_in_turn(self, flat: Tensor) -> None:
        """Add the vectors of the other ranks to `flat`, one after the other, in the order of the ranks.

        No reduce of gloo's: there partial sums go around the ranks, so others than the first would hold them, and their
        order of additions is another one. No gather: it holds the vectors of all ranks at once, and is slower
        (benchmarks/exchange.py).
        """
        part = torch.empty_like(flat)
        for rank in range(1, self.size):
            distributed.recv(part, src=rank, group=self.group)
            flat += part

    @contextmanager
    def _lost_ranks(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            # both in one line: a rank that waited in vain closes its connections, which looks like an end to the others
            raise RankLost(
                f"another rank has ended, or has not answered for compute.rank_timeout_minutes="
                f"{self.timeout_minutes:g} (set more if it only needs longer); {GOES_ON} ({reason})"
            ) from None

    def require_same(self, value: Any) -> None:
        """InputError on the first rank unless all ranks give an equal `value`."""
        others = [rank for rank, given in enumerate(self.gather(value)) if given != value]
        if others:
            raise InputError(
                f"rank {others[0]}: has another configuration, code, base model or other data than rank 0; all ranks "
                "must see the same checkout, outputs and data"
            )


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten().cpu() for tensor in tensors.values()])


def _cut(flat: Tensor, like: Mapping[str, Tensor]) -> Iterator[Tensor]:
    parts = flat.split([tensor.numel() for tensor in like.values()])
    return (part.view(tensor.shape) for part, tensor in zip(parts, like.values(), strict=True))
