"""Time and memory of a study's conditions."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dp_lora.study.comparisons import Condition
from dp_lora.study.statistics import Mean, mean


@dataclass(frozen=True)
class Expense:
    """The cost of a run of one condition, over the runs that have begun a stage."""

    condition: str
    runs: int
    minutes: Mean  # of all stages together
    stages: Mapping[str, float]  # stage -> mean minutes
    peak_memory: float | None  # GiB: the largest of all runs
    gpu_hours: float  # mean
    devices: tuple[str, ...]


def expenses_of(conditions: Iterable[Condition]) -> list[Expense]:
    """The expense of each condition of which a stage is finished."""
    found = []
    for one in conditions:
        rows = [row for row in one.rows if row.outcome.seconds]
        if not rows:
            continue
        stages = dict.fromkeys(stage for row in rows for stage in row.outcome.seconds)
        memory = [row.outcome.peak_memory for row in rows if row.outcome.peak_memory is not None]
        found.append(
            Expense(
                one.label,
                len(rows),
                mean([(row.seconds or 0.0) / 60 for row in rows], (0.0, math.inf)),
                {stage: mean([row.outcome.seconds.get(stage, 0.0) / 60 for row in rows]).value for stage in stages},
                max(memory, default=None),
                math.fsum(row.gpu_hours or 0.0 for row in rows) / len(rows),
                tuple(dict.fromkeys(row.outcome.device for row in rows if row.outcome.device)),
            )
        )
    return found
