"""A study's costs before it is run: hours, GPU memory, and epsilon if all its private members were published."""

import statistics
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dp_lora.files import read_json
from dp_lora.models.counting import count_parameters
from dp_lora.models.estimate import (
    Rates,
    count_flops,
    estimate_basis,
    finetuning_work,
    processor_basis,
    sampling_work,
    time_text,
)
from dp_lora.models.memory import memory_line
from dp_lora.privacy.accounting import Spent
from dp_lora.privacy.releases import all_releases
from dp_lora.study.audits import auditors
from dp_lora.study.grid import Grid
from dp_lora.study.place import REQUIRED, RESULTS, Place
from dp_lora.study.result import DONE
from dp_lora.training.costs import processor_at_hand, rates_at_hand
from dp_lora.training.resolved import Resolved

Starts = Mapping[int, Resolved]  # by the member's number
NO_GUARANTEE = "without a guarantee: never to be published"


@dataclass(frozen=True)
class Cost:
    """Cost of one member's fine-tuning and sampling, from public numbers alone."""

    seconds: float
    basis: str  # what the seconds rest on
    on_gpu: float | None  # seconds on the GPU that estimates name, where `seconds` are of this machine's processor


class Costs:
    """Costs of members; a network that several share is measured once."""

    def __init__(self) -> None:
        self._rates: dict[Hashable, Rates | None] = {}

    def of(self, start: Resolved) -> Cost:
        """The cost of a member with this start on this machine."""
        config, family = start.config, start.shapes.family
        row = count_flops(config, start.base, start.shapes)
        key = (_network(start), str(config.lora), str(config.sampling), config.privacy.batch_size, config.privacy.k)
        if key not in self._rates:
            self._rates[key] = rates_at_hand(config, start.base)
        rates = self._rates[key]
        parts = finetuning_work(config, row, start.plan.steps, start.plan.expected_batch, rates, family)
        parts += sampling_work(config, row, rates, family)
        seconds = sum(part.seconds for part in parts)
        if (processor := processor_at_hand(config)) is None:
            return Cost(seconds, estimate_basis(rates), None)
        return Cost(sum(part.seconds_on(processor) for part in parts), processor_basis(processor), seconds)


def _network(start: Resolved) -> Hashable:
    """The settings that a row's memory depends on, besides the trained weights."""
    config = start.config
    return (str(start.base), str(config.autoencoder), str(config.ldm), config.data.size, str(config.compute))


def largest_members(starts: Starts) -> list[int]:
    """The number of the member with the most trained weights, on each network."""
    trained = {number: count_parameters(start.config, start.shapes)["trainable"] for number, start in starts.items()}
    largest: dict[Hashable, int] = {}
    for number in sorted(trained, key=lambda number: (-trained[number], number)):
        largest.setdefault(_network(starts[number]), number)
    return sorted(largest.values())


def memory_lines(starts: Starts) -> Iterator[str]:
    """The GPU's memory in fine-tuning, of the member with the most trained weights on each network."""
    for number in largest_members(starts):
        start = starts[number]
        yield f"GPU memory, of member {number}: {memory_line(start.config, start.base, start.shapes)}"


def spent_by_all(found: Sequence[Place], starts: Starts) -> Spent | None:
    """Epsilon and delta of publishing all private members, each release once; None where no member is private.

    Members that are one fine-tuning are one release. Where an adapter was lost and made anew, each of its runs counts.
    Members without a guarantee are left out: they are never to be published. Raises InputError as `all_releases`.
    """
    made: dict[str, dict[str, int]] = {}
    private = [place for place in found if starts[place.number].plan.guaranteed]
    for place in private:
        statement = place.folder / RESULTS["finetune"] / "release" / "privacy.json"
        runs = made.setdefault(place.release, {})
        if statement.exists():
            runs.setdefault(read_json(statement)["run_id"], place.number)
    if not private:
        return None
    first = {place.release: place.number for place in reversed(private)}
    numbers = [number for release, runs in made.items() for number in (runs.values() or [first[release]])]
    before = [part for number in numbers for part in (*starts[number].spent_by_base(), *starts[number].parent)]
    return all_releases([starts[number].plan for number in numbers], before)


def privacy_lines(found: Sequence[Place], starts: Starts, spent: Spent | None) -> list[str]:
    """The result of `spent_by_all`, and the members without a guarantee, as lines for people."""
    lines = []
    if spent is not None:
        count = sum(starts[place.number].plan.guaranteed for place in found)
        lines.append(
            f"publishing all {count} private members: epsilon {spent.epsilon:.4g} at delta {spent.delta:g}: they read "
            "the same private pictures, so they compose"
        )
    if unbounded := [place.number for place in found if not starts[place.number].plan.guaranteed]:
        lines.append(f"{_numbered(unbounded)}: {NO_GUARANTEE}")
    return lines


def plan_lines(grid: Grid, found: Sequence[Place], starts: Starts) -> Iterator[str]:
    """The lines that a dry run prints about a study."""
    costs = Costs()
    of = {place.number: costs.of(starts[place.number]) for place in found}
    yield f"study: {grid.name}: {grid.title}"
    width = max(len(place.member.name) for place in found)
    audits = auditors(grid, found)
    for place in found:
        facts = [place.member.group]
        facts += [] if starts[place.number].plan.guaranteed else [NO_GUARANTEE]
        facts += [f"makes {', '.join(audits[place.number])}"] if place.number in audits else []
        facts += [DONE] if place.outcome().state == DONE else []
        took = time_text(of[place.number].seconds)
        yield f"{place.number:>3}  {place.member.name:<{width}}  {took:<12}  {'; '.join(facts)}"
    yield f"members: {len(found)}, each with {', '.join(REQUIRED)}"
    yield f"estimated total, one member at a time: {time_text(sum(cost.seconds for cost in of.values()))}"
    yield from (f"estimated on: {basis}" for basis in dict.fromkeys(cost.basis for cost in of.values()))
    if elsewhere := [cost.on_gpu for cost in of.values() if cost.on_gpu is not None]:
        yield f"estimated total, on {estimate_basis()}: {time_text(sum(elsewhere))}"
    yield from _measured(found)
    yield from memory_lines(starts)
    yield from privacy_lines(found, starts, spent_by_all(found, starts))


def _measured(found: Sequence[Place]) -> Iterator[str]:
    """The time that finished members took here: it tells more than an estimate."""
    records = [(place, place.read()) for place in found]
    seconds = [sum(record.seconds.values()) for place, record in records if place.is_done(record)]
    if seconds:
        mean, left = statistics.mean(seconds), len(found) - len(seconds)
        yield (
            f"measured here: {time_text(mean)} a member, of {len(seconds)} that are done; {time_text(mean * left)} for "
            f"the {left} that are left, one at a time"
        )


def _numbered(numbers: Sequence[int]) -> str:
    """Such as members 1 to 3, 7."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    shown = ", ".join(f"{group[0]} to {group[-1]}" if len(group) > 1 else f"{group[0]}" for group in groups)
    return f"member{'s' if len(numbers) > 1 else ''} {shown}"
