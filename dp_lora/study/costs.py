"""What a study costs before it is run: hours, GPU memory, and epsilon if all that is private of it were published."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dp_lora.models.estimate import count_flops, estimate_basis, finetuning_work, sampling_work
from dp_lora.privacy.accounting import Spent
from dp_lora.privacy.releases import all_releases
from dp_lora.training.costs import rates_at_hand
from dp_lora.training.resolved import Resolved

Value = TypeVar("Value")
NO_GUARANTEE = "without a guarantee: never to be published"


@dataclass(frozen=True)
class Cost:
    """Of one member, from public numbers alone."""

    seconds: float  # of fine-tuning and sampling
    basis: str  # what they rest on
    memory: str  # of the fine-tuning on a GPU


class Costs:
    """Costs of members; what several have in common is counted, or measured, once."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, object] = {}

    def of(self, start: Resolved) -> Cost:
        """What a member that starts so costs. Where there is no GPU it is computed for another machine's."""
        config, family = start.config, start.shapes.family
        row = count_flops(config, start.base, start.shapes)
        network = (str(start.base), str(config.lora), str(config.autoencoder), str(config.ldm), config.data.size)
        rates = self._once(
            ("rates", *network, str(config.compute), str(config.sampling), config.privacy.batch_size, config.privacy.k),
            lambda: rates_at_hand(config, start.base),
        )
        parts = finetuning_work(config, row, start.plan.steps, start.plan.expected_batch, rates, family)
        parts += sampling_work(config, row, rates, family)

        def memory() -> str:
            from dp_lora.models.memory import memory_line  # torch and diffusers

            return memory_line(config, start.base, start.shapes)

        shown = self._once(("memory", *network, config.compute.precision, config.compute.checkpointing), memory)
        return Cost(sum(part.seconds for part in parts), estimate_basis(rates), shown)

    def _once(self, key: Hashable, make: Callable[[], Value]) -> Value:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]  # type: ignore[return-value]


def spent_by(starts: Sequence[Resolved]) -> Spent | None:
    """Epsilon and delta of publishing these fine-tunings, a start for each release; None where none is private.

    Those without a guarantee are left out: they are never to be published. Raises InputError as `all_releases`.
    """
    private = [start for start in starts if start.plan.guaranteed]
    if not private:
        return None
    before = [part for start in private for part in (*start.spent_by_base(), *start.parent)]
    return all_releases([start.plan for start in private], before)
