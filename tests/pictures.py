"""README's pictures, from the runs of `make study STUDY=mnist5k`: `make pictures`; with `emoji`, docs/emoji.md's.

The private pictures of both are MNIST's and Twemoji's, which everybody has: these pages may show real ones, and scores.
"""

import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from numpy.typing import NDArray
from PIL import Image

from dp_lora.cli.common import one_line_errors
from dp_lora.config import ROOT, STAGES, Config, flatten, load
from dp_lora.config.prompts import drawn_prompts
from dp_lora.data.layout import Dataset, read_dataset
from dp_lora.errors import InputError
from dp_lora.files import whole_file
from dp_lora.grids import CELL, GAP, write_grid
from dp_lora.sampling.folder import GRID_COLUMNS, SPLIT
from dp_lora.study.grid import read_study
from dp_lora.study.place import places
from dp_lora.study.plots import Series, draw_scores
from dp_lora.study.scores import ACCURACY
from dp_lora.tracking.links import GRID
from dp_lora.tracking.provenance import param_text
from dp_lora.tracking.store import connect, search_runs

if TYPE_CHECKING:
    from mlflow.entities import Run

RESULTS = ROOT / "benchmarks" / "results"
DEFAULT_CONFIG = STAGES["main"].default_config
STRIP = (1.0, 10.0, math.inf)  # epsilons beside the real pictures
EVERY = 4  # of the prompts of docs/emoji.md
PER_CLASS = 2  # pictures: always the first ones, so that nobody selects the best
LINES = {
    "accuracy_train_on_real": "classifier of real digits",
    "accuracy_public_only": "classifier of public rendered digits",
    "accuracy_untrained_embedding": "classifier of samples before fine-tuning",
}
VARIED = ("privacy.eps", "experiment.seed", "experiment.description")  # compute may differ too


def shown_eps(eps: float) -> str:
    return "no privacy" if math.isinf(eps) else f"eps {eps:g}"


def default_runs(stage: str, config: Config) -> dict[tuple[float, int], "Run"]:
    """The newest finished run of a stage per epsilon and seed; all other settings are those of `config`."""
    condition = f"tags.experiment = '{config.experiment.name}' AND tags.stage = '{stage}'"
    condition += " AND attributes.status = 'FINISHED'"
    found = search_runs(connect(), condition, max_results=1000, order_by=["attributes.end_time DESC"])
    return newest(found, config)


def newest(runs: Sequence["Run"], config: Config) -> dict[tuple[float, int], "Run"]:
    """The first of `runs`, newest first, per epsilon and seed; all other settings are those of `config`."""
    settings = {key: param_text(value) for key, value in flatten(config).items() if key not in VARIED}
    settings = {key: text for key, text in settings.items() if not key.startswith("compute.")}
    first: dict[tuple[float, int], Run] = {}
    for run in runs:
        params = run.data.params
        if settings.items() <= params.items():
            first.setdefault((float(params["privacy.eps"]), int(params["experiment.seed"])), run)
    return first


def cut_grid(grid: Image.Image, classes: int, size: int) -> NDArray[np.uint8]:
    """Pictures, uint8 (classes, GRID_COLUMNS, size, size, 3), of a full grid that `draw_grid` drew, one row per class.

    ValueError for a picture that is no such grid.
    """
    scale = max(1, -(-CELL // size))
    step, side = size * scale + GAP, size * scale
    left = grid.width - GRID_COLUMNS * step
    if left <= 0 or grid.height != classes * step + GAP:
        raise ValueError(f"no grid of {classes} rows of {GRID_COLUMNS} pictures of {size} pixels: {grid.size}")
    pixels = np.asarray(grid.convert("RGB"))
    # the grid shows each pixel as scale x scale equal ones
    rows = [
        [pixels[top : top + side : scale, x : x + side : scale] for x in range(left, grid.width, step)]
        for top in range(GAP, classes * step, step)
    ]
    return np.array(rows)


def write_strip(path: Path, pictures: Mapping[str, NDArray[np.uint8]]) -> None:
    """Write a picture with a class per column; `pictures`: name -> uint8 (classes, n, H, W, 3), n rows per name."""
    rows, names = [], []
    for name, of_classes in pictures.items():
        rows += list(of_classes.swapaxes(0, 1))
        names += [name] + [""] * (of_classes.shape[1] - 1)
    write_grid(path, rows, names)


def write_accuracy(path: Path, scored: Mapping[tuple[float, int], "Run"], delta: float) -> None:
    """Write the plot of all runs' accuracies, with the reference scores of the same runs."""
    scores: dict[float | str, list[float]] = {}
    for (eps, _), run in scored.items():
        scores.setdefault(eps, []).append(100 * run.data.metrics["accuracy"])
    metrics = [run.data.metrics for run in scored.values()]
    lines = {shown: 100 * statistics.mean(found[name] for found in metrics) for name, shown in LINES.items()}
    below = f"target epsilon of one run, delta {delta:g}"
    figure = draw_scores([Series(scores)], lines, below, ACCURACY.axis, of_epsilon=True, size=(8, 5))
    with whole_file(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


def real_pictures(folder: Path, classes: Sequence[str], count: int) -> NDArray[np.uint8]:
    """The first `count` real test pictures of each class, uint8 (classes, count, H, W, 3)."""
    dataset = read_dataset(folder, list(classes), "test")
    chosen = [np.flatnonzero(dataset.labels == position)[:count] for position in range(len(classes))]
    pixels = dataset.images(np.concatenate(chosen))
    return np.broadcast_to(pixels, (*pixels.shape[:3], 3)).reshape(len(classes), count, *pixels.shape[1:3], 3)


def sampled_pictures(run: "Run", classes: int, size: int) -> NDArray[np.uint8]:
    """All pictures of the grid in a run of `sample`."""
    with tempfile.TemporaryDirectory() as folder:
        path = connect().download_artifacts(run.info.run_id, GRID, folder)
        with Image.open(path) as grid:
            return cut_grid(grid, classes, size)


def pictures_of(dataset: Dataset, prompts: Sequence[str]) -> NDArray[np.uint8]:
    """The first picture of each caption, uint8 (prompts, 1, H, W, 3)."""
    texts = [captions[0] for captions in dataset.captions or ()]
    return dataset.images(np.array([texts.index(prompt) for prompt in prompts]))[:, np.newaxis]


def emoji() -> None:
    """Draw docs/emoji.md's strip: real pictures of both sets, and between them samples of the study's members."""
    found = places(read_study("emoji"))
    config, prompts = found[0].config, drawn_prompts(found[0].config)
    shown = prompts[::EVERY]  # by their place in the file, so that nobody selects the best
    public = read_dataset(ROOT / str(config.public.folder), config.public.classes, "train")
    pictures = {"public: OpenMoji": pictures_of(public, shown)}
    for eps in (10.0, math.inf):
        (member, *_) = (one for one in found if one.config.privacy.eps == eps)
        samples = read_dataset(member.folder / "samples", prompts, SPLIT)
        first = [np.flatnonzero(samples.labels == prompts.index(prompt))[:PER_CLASS] for prompt in shown]
        drawn = samples.images(np.concatenate(first))
        pictures[shown_eps(eps)] = drawn.reshape(len(shown), PER_CLASS, *drawn.shape[1:])
    pictures["private: Twemoji"] = pictures_of(read_dataset(ROOT / str(config.data.folder), [], "test"), shown)
    write_strip(RESULTS / "emoji.png", pictures)
    print(f"{RESULTS.relative_to(ROOT)}/emoji.png: {', '.join(shown)}")


def main() -> None:
    """Draw the strip and the plot from the store's runs, and print which runs they are."""
    config = load(DEFAULT_CONFIG)
    outputs, classes = ROOT / "outputs" / DEFAULT_CONFIG, config.data.classes
    scored, sampled = default_runs("fid", config), default_runs("sample", config)
    missing = [shown_eps(eps) for eps in STRIP if (eps, config.experiment.seed) not in sampled]
    if missing or not scored:
        shown = ", ".join(missing) or "all"
        raise InputError(
            f"pictures: the store lacks runs of {DEFAULT_CONFIG} ({shown}); run `make study STUDY=mnist5k` first"
        )
    pictures = {"real": real_pictures(outputs / "data", classes, PER_CLASS)}
    for eps in STRIP:
        run = sampled[eps, config.experiment.seed]
        pictures[shown_eps(eps)] = sampled_pictures(run, len(classes), config.data.size)[:, :PER_CLASS]
    write_strip(RESULTS / "strip.png", pictures)
    write_accuracy(RESULTS / "accuracy.png", scored, config.privacy.delta)
    for (eps, seed), run in sorted(scored.items()):
        commit = run.data.tags.get("mlflow.source.git.commit", "unknown")[:10]
        print(f"{shown_eps(eps)}, seed {seed}: accuracy {run.data.metrics['accuracy']}, commit {commit}")
    print(f"{RESULTS.relative_to(ROOT)}/: strip.png, accuracy.png")


if __name__ == "__main__":
    with one_line_errors():
        emoji() if "emoji" in sys.argv[1:] else main()
