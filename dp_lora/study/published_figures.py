"""Figures that other systems published, read from published_figures.yaml, each with its source."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dp_lora.errors import InputError

FILE = Path(__file__).with_name("published_figures.yaml")


@dataclass(frozen=True)
class PublishedFigure:
    """One number that another system published, in the unit of metrics.json."""

    metric: str
    value: float
    epsilon: float  # inf: without privacy
    delta: float | None
    configs: Sequence[str]  # experiments on the same private pictures
    stated: str  # where in the source


@dataclass(frozen=True)
class System:
    """Another system, and what it published."""

    name: str
    source: str  # an address
    note: str
    figures: Sequence[PublishedFigure]

    def of(self, configs: Collection[str]) -> list[PublishedFigure]:
        """Its figures for one of these experiments."""
        return [figure for figure in self.figures if set(figure.configs) & set(configs)]


def read_systems(path: Path = FILE) -> list[System]:
    """The systems in a file of the form that its head states; InputError in one line for any other form."""
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        return [_system(one) for one in loaded["systems"]]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        raise InputError(f"{path.name}: not in the form that its head states ({problem})") from None


def _system(one: dict[str, Any]) -> System:
    if not str(one["source"]).startswith("https://"):
        raise ValueError(f"{one['name']}: source must be an https address")
    return System(str(one["name"]), str(one["source"]), str(one["note"] or ""), [_figure(f) for f in one["figures"]])


def _figure(one: dict[str, Any]) -> PublishedFigure:
    value, epsilon = float(one["value"]), float(one["epsilon"])
    if not math.isfinite(value) or not epsilon > 0:
        raise ValueError(f"value {value} must be finite, and epsilon {epsilon} above 0")
    delta = None if one["delta"] is None else float(one["delta"])
    return PublishedFigure(
        str(one["metric"]), value, epsilon, delta, list(map(str, one["configs"])), str(one["stated"])
    )
