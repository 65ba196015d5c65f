"""The members of a study as rows: each one's settings, and the files that its stages left."""

import csv
import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dp_lora.config import Config, flatten
from dp_lora.errors import InputError
from dp_lora.study.grid import config_of
from dp_lora.study.result import DONE, Member, Outcome

LEAVES = ("release", "not-private")  # what `finetune` makes, with a guarantee and without
# two members that differ in these alone are one condition
UNCOMPARED = ("experiment.seed", "experiment.name", "experiment.description")


@dataclass(frozen=True)
class Row:
    """One member; a field is empty if its stage left no file."""

    outcome: Outcome
    config: Config | None  # None: it is not valid, and the member failed for it
    statement: Mapping[str, Any] = field(default_factory=dict)  # privacy.json
    metrics: Mapping[str, float] = field(default_factory=dict)  # finite ones of metrics.json
    curve: tuple[tuple[float, float], ...] = ()  # (step, epsilon), from epsilon.csv
    grid: Path | None = None
    lacks: tuple[str, ...] = ()  # files that a member that is done should have left

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """All keys of the config under their dotted names; empty where it is not valid."""
        return {} if self.config is None else flatten(self.config)

    @property
    def label(self) -> str:
        """The member's name without its seed: that of its condition."""
        return re.sub(r"\s*\bseed=\d+$", "", self.outcome.member.name) or self.outcome.member.config

    @property
    def compared(self) -> dict[str, Any]:
        """The settings that make two members comparable: all but the seed and names."""
        if self.config is None:
            member = self.outcome.member
            typed = {key: value for key, value in member.settings.items() if key not in UNCOMPARED}
            return {"config": member.config, **typed}
        return {key: value for key, value in self.settings.items() if key not in UNCOMPARED}

    @property
    def seconds(self) -> float | None:
        """Wall-clock time of all stages together."""
        return math.fsum(self.outcome.seconds.values()) if self.outcome.seconds else None

    @property
    def gpu_hours(self) -> float | None:
        seconds = self.seconds
        return None if seconds is None else seconds * self.outcome.gpus / 3600

    @property
    def epsilon(self) -> float | None:
        """The epsilon spent: inf without a guarantee, None while nothing was trained."""
        if not self.statement:
            return None
        return float(self.statement["epsilon"]) if self.statement.get("private") else math.inf

    @property
    def spent(self) -> str:
        """`epsilon` in words; empty while nothing was trained."""
        if self.epsilon is None:
            return ""
        if "claimed_epsilon" in self.statement:
            claimed, bounded = self.statement["claimed_epsilon"], self.statement["bounded_epsilon"]
            return f"no guarantee: claims {claimed:.4g}, bounded by {bounded:.4g}"
        return "none: not private" if math.isinf(self.epsilon) else f"{self.epsilon:.4g}"


def read_row(outcome: Outcome) -> Row:
    """Read what the member of `outcome` left; scores count only if the member is done.

    Reads scores on private pictures: the row is for the operator alone.
    """
    member = outcome.member
    config = _config(member)
    if outcome.state != DONE:
        return Row(outcome, config)
    folder, lacks = outcome.folder, []

    def found(path: Path, shown: str) -> Any:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            lacks.append(shown)
            return {}

    left = next((name for name in LEAVES if (folder / "finetune" / name).is_dir()), LEAVES[0])
    statement = found(folder / "finetune" / left / "privacy.json", f"finetune/{left}/privacy.json")
    metrics = found(folder / "evaluation" / "metrics.json", "evaluation/metrics.json")
    grid = folder / "samples" / "grid.png"
    if not grid.exists():
        lacks.append("samples/grid.png")
    return Row(
        outcome,
        config,
        statement,
        {name: float(value) for name, value in metrics.items() if math.isfinite(value)},
        _curve(folder / "finetune" / "epsilon.csv"),
        grid if grid.exists() else None,
        tuple(lacks),
    )


def _config(member: Member) -> Config | None:
    try:
        return config_of(member)
    except InputError:  # the member's own line says so
        return None


def _curve(path: Path) -> tuple[tuple[float, float], ...]:
    if not path.exists():
        return ()
    with path.open(encoding="utf-8", newline="") as file:
        return tuple((float(line["step"]), float(line["epsilon"])) for line in csv.DictReader(file))
