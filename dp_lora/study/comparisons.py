"""Conditions of a study, which are members that differ in the seed alone, and the comparisons that they are part of."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dp_lora.study.rows import Row
from dp_lora.study.statistics import Spread, spread

EPSILON = "privacy.eps"
NO_PRIVACY = "no privacy"
NAMES = {
    EPSILON: "epsilon",
    "lora.rank": "rank of LoRA",
    "privacy.k": "k, noise draws per picture",
    "privacy.max_grad_norm": "max_grad_norm C",
    "lora.targets": "targets of LoRA",
    "privacy.batch_size": "expected batch",
    "compute.physical_batch_size": "physical batch",
}


@dataclass(frozen=True)
class Condition:
    """Members with equal settings, a row per seed."""

    rows: tuple[Row, ...]

    @property
    def label(self) -> str:
        return self.rows[0].label

    @property
    def scored(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.metrics)

    @property
    def eps(self) -> float | None:
        """Target epsilon; inf without privacy; None where the config is not valid."""
        value = self.rows[0].settings.get(EPSILON)
        return None if value is None else float(value)

    def values(self, metric: str) -> list[float]:
        """A metric's values, one per seed that has it."""
        return [row.metrics[metric] for row in self.rows if metric in row.metrics]

    def above(self, metric: str, reference: str) -> list[float]:
        """A metric's values less those of another metric, one per seed that has both."""
        both = [row.metrics for row in self.rows if metric in row.metrics and reference in row.metrics]
        return [metrics[metric] - metrics[reference] for metrics in both]


@dataclass(frozen=True)
class Comparison:
    """Conditions that differ in `keys` alone, in the order of their values; `own`: index of the config's own.

    `every` has all conditions of the study. Their spread over seeds is that of each comparison, so a condition that
    stands in two of them has one interval.
    """

    title: str
    keys: tuple[str, ...]
    conditions: tuple[Condition, ...]
    own: int
    every: tuple[Condition, ...]

    def spread(self, metric: str) -> Spread:
        return spread(one.values(metric) for one in self.every)

    def spread_above(self, metric: str, reference: str) -> Spread:
        return spread(one.above(metric, reference) for one in self.every)

    @property
    def of_epsilon(self) -> bool:
        return self.keys == (EPSILON,)

    @property
    def name(self) -> str:
        """The setting that differs, as the title of an axis."""
        return NAMES.get(self.keys[0], self.keys[0]) if len(self.keys) == 1 else self.title

    def value(self, condition: Condition) -> float | str:
        """Where `condition` stands: a number, or words."""
        if len(self.keys) > 1:
            return condition.label
        value = condition.rows[0].settings.get(self.keys[0])
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else _words(value)

    def shown(self, condition: Condition) -> str:
        """The value in the words of a sentence: eps 10, rank 4."""
        value = self.value(condition)
        if len(self.keys) > 1:
            return str(value)
        if self.of_epsilon and value == math.inf:
            return NO_PRIVACY
        name = "eps" if self.of_epsilon else self.keys[0].split(".")[-1]
        return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


def _words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def conditions(rows: Iterable[Row]) -> list[Condition]:
    """Rows grouped by their settings, in the order of each group's first row."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(json.dumps(row.compared, sort_keys=True, default=str), []).append(row)
    return [Condition(tuple(same)) for same in found.values()]


def comparisons(rows: Sequence[Row]) -> list[Comparison]:
    """One comparison per group of members, in the study's order, with the conditions of other groups that belong to it.

    A group that has nothing to be compared with is left out.
    """
    every = [condition for condition in conditions(rows) if condition.rows[0].settings]
    groups = dict.fromkeys(row.outcome.member.group for row in rows)
    found = [_comparison(group, every) for group in groups]
    return [comparison for comparison in found if comparison is not None]


def _comparison(group: str, every: Sequence[Condition]) -> Comparison | None:
    own = [one for one in every if any(row.outcome.member.group == group for row in one.rows)]
    others = [one for one in every if one not in own]
    if not own:
        return None
    keys = _differing(own)
    if not keys:  # one condition alone: compare it with the nearest condition of the other groups
        near = sorted((_differing([own[0], other]) for other in others), key=len)
        if not near:
            return None
        keys = near[0]
    fixed = _but(own[0], keys)
    members = own + [other for other in others if _but(other, keys) == fixed]
    if len(members) < 2:
        return None
    # the study varies around the condition that other groups share: put it first
    members.sort(key=lambda one: all(row.outcome.member.group == group for row in one.rows))
    own_one = members[0]
    comparison = Comparison(group or "members", keys, tuple(members), 0, tuple(every))
    if len(keys) == 1 and all(isinstance(comparison.value(one), float) for one in members):
        members.sort(key=comparison.value)
    return replace(comparison, conditions=tuple(members), own=members.index(own_one))


def _differing(some: Sequence[Condition]) -> tuple[str, ...]:
    first, *rest = (one.rows[0].compared for one in some)
    return tuple(key for key in first if any(other.get(key) != first[key] for other in rest))


def _but(condition: Condition, keys: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in condition.rows[0].compared.items() if key not in keys}
