"""The files of an evaluation: metrics, a table that explains each number, per-class accuracy, confusion."""

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dp_lora.evaluation.copying import Copying, write_distances
from dp_lora.evaluation.measurement import Measurement
from dp_lora.evaluation.utility import Score
from dp_lora.files import whole_file, whole_folder, write_json

NUMBERED = 30  # classes up to which every cell of the confusion matrix shows its count


@dataclass(frozen=True)
class EvaluationResult:
    """The result of `evaluate`; `folder` holds it as files."""

    measurements: list[Measurement]
    folder: Path
    classes: list[str] = field(default_factory=list)  # empty: no classes, and nothing of classes was scored
    score: Score | None = None
    class_agreement: list[float] = field(default_factory=list)
    copying: Copying | None = None  # none: there were too few test pictures

    @property
    def metrics(self) -> dict[str, float]:
        """All numbers by name; intervals as NAME_low and NAME_high."""
        found: dict[str, float] = {}
        for measurement in self.measurements:
            found[measurement.metric] = measurement.value
            if measurement.low is not None and measurement.high is not None:
                found |= {f"{measurement.metric}_low": measurement.low, f"{measurement.metric}_high": measurement.high}
        return found

    @property
    def private(self) -> frozenset[str]:
        """Names in `metrics` that were computed from private pictures without noise."""
        secret = tuple(measurement.metric for measurement in self.measurements if measurement.private)
        return frozenset(n for n in self.metrics if n.removesuffix("_low").removesuffix("_high") in secret)

    @property
    def table(self) -> dict[str, list[Any]]:
        """The measurements as columns, a row each."""
        columns = ("metric", "value", "low", "high", "meaning", "private")
        return {name: [getattr(measurement, name) for measurement in self.measurements] for name in columns}

    @property
    def per_class(self) -> dict[str, list[Any]]:
        """Columns with a row per class: its name, and as floats accuracy (NaN without a picture), counts, agreement."""
        if self.score is None:
            return {}
        right, n = self.score.confusion.diagonal(), self.score.confusion.sum(axis=1)
        accuracy = [float(f"{a / b:.6g}") if b else float("nan") for a, b in zip(right, n, strict=True)]
        agreement = [float(f"{value:.6g}") for value in self.class_agreement]
        counts = {"correct": right.astype(float).tolist(), "n": n.astype(float).tolist()}
        return {"class": list(self.classes), "accuracy": accuracy, **counts, "class_agreement": agreement}


def write_result(result: EvaluationResult) -> None:
    """Write metrics.json and table.json into `result.folder`, whole or not at all.

    Beside them nearest_distances.png where copies were looked for, and of classes per_class.csv and confusion.png.
    """
    with whole_folder(result.folder, private=True) as folder:
        write_json(folder / "metrics.json", result.metrics)
        write_json(folder / "table.json", [_row(measurement) for measurement in result.measurements])
        if result.copying is not None:
            write_distances(folder / "nearest_distances.png", result.copying)
        if result.score is not None:
            _write_per_class(folder / "per_class.csv", result)
            write_confusion(folder / "confusion.png", result.score.confusion, result.classes)


def _row(measurement: Measurement) -> dict[str, Any]:
    return {key: value for key, value in vars(measurement).items() if value is not None}


def _write_per_class(path: Path, result: EvaluationResult) -> None:
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(result.per_class)
        for name, accuracy, right, n, agreement in zip(*result.per_class.values(), strict=True):
            writer.writerow([name, f"{accuracy:.6g}", int(right), int(n), f"{agreement:.6g}"])


def write_confusion(path: Path, confusion: NDArray[np.int64], classes: list[str]) -> None:
    """A picture of `confusion` (classes, classes): rows real, columns predicted, shaded by share of the row."""
    share = confusion / np.maximum(1, confusion.sum(axis=1, keepdims=True))
    numbered = len(classes) <= NUMBERED
    side = max(4.0, 1.8 + 0.48 * len(classes)) if numbered else 12.0
    figure = Figure(figsize=(side, side), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("real class")
    if numbered:
        turned = max(len(name) for name in classes) > 3
        axes.set_xticks(range(len(classes)), classes, rotation=90 if turned else 0)
        axes.set_yticks(range(len(classes)), classes)
        for (i, j), count in np.ndenumerate(confusion):
            if count:
                colour = "white" if share[i, j] > 0.5 else "black"
                axes.text(j, i, str(count), ha="center", va="center", color=colour, fontsize=9)
    with whole_file(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)
