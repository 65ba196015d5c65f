"""A folder of samples: whole or absent, made in parts that survive a kill."""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dp_lora.config.schema import Config, Sampling
from dp_lora.data.layout import Picture, fill_dataset
from dp_lora.data.png import encode_png
from dp_lora.errors import InputError
from dp_lora.events import Events
from dp_lora.files import digest_value, whole_file, whole_folder, write_json
from dp_lora.grids import write_grid
from dp_lora.models.device import pick_precision, precision_name
from dp_lora.models.folder import Model, module_digest
from dp_lora.models.pipeline_index import steps_and_guidance
from dp_lora.models.pipelines import text_encoders
from dp_lora.progress import progress
from dp_lora.sampling.archive import write_archive
from dp_lora.sampling.ddim import draw
from dp_lora.sources import digest_code
from dp_lora.team import Team

SPLIT = "synthetic"
GRID_COLUMNS = 10
PACKED_UP_TO = 64  # pixels of width: larger images become a folder of PNG files instead of one parquet file


def balanced(classes: Sequence[str], n: int) -> list[tuple[str, int]]:
    """(class, index) of exactly n images, class by class; where n does not divide, the first classes get one more."""
    share, more = divmod(n, len(classes))
    return [(name, i) for c, name in enumerate(classes) for i in range(share + (c < more))]


def model_fingerprint(model: Model) -> str:
    """SHA-256 of all that determines a model's images: networks, class embedding, scheduler and class names."""
    scheduler = {key: value for key, value in dict(model.scheduler.config).items() if not key.startswith("_")}
    parts = [module_digest(model.denoiser), module_digest(model.vae)]
    if model.family.of_classes:
        embedding = np.ascontiguousarray(model.embedded().detach().cpu().numpy())
        parts.append(digest_value(embedding.tolist()))
    else:
        parts += [module_digest(encoder) for encoder in text_encoders(model.pipeline)]
    return digest_value([*parts, digest_value(json.loads(json.dumps(scheduler, default=str))), model.classes])


def sample(
    model: Model,
    config: Config,
    classes: Sequence[str],
    n: int,
    working_folder: Path,
    out_folder: Path,
    events: Events,
    facts: Mapping[str, Any] | None = None,
    team: Team = Team(),  # noqa: B008 (frozen)
) -> None:
    """Draw n images, balanced over `classes`, on the device of `model`; write `out_folder`, whole or not at all.

    Finished batches are kept in `working_folder` under a key of model, settings, device and code: a second call after a
    kill resumes there and ends in the same bytes. `out_folder` is a dataset of split "synthetic" with samples.npz
    (arr_0 uint8 NHWC in RGB, arr_1 positions in `classes`), grid.png and samples.json, which repeats `facts` (base,
    privacy).
    The ranks of `team` take a batch each; its first one calls this, the others `assist`.
    Raises InputError for a class that the model does not know.
    """
    unknown = [name for name in classes if name not in model.classes]
    if unknown or not classes or n < 1:
        problem = (
            f"class {unknown[0]!r} is not one of the model's" if unknown else f"{n} images of {len(classes)} classes"
        )
        raise InputError(f"sampling: {problem}; the model knows {', '.join(model.classes[:20])}")
    device = model.device
    settings = _settings(model, config, classes, n)
    rows = balanced(classes, n)
    made_by = [device.type, torch.__version__, digest_code("sampling/__init__.py")]
    parts = Path(working_folder) / digest_value([settings, made_by])[:16]
    team.require_same(settings)
    _draw_parts(model, config, rows, parts, events, team)

    positions = np.array([classes.index(name) for name, _ in rows], dtype=np.int64)
    size, channels = model.info["size"], model.info["channels"]
    with whole_folder(Path(out_folder)) as temporary:
        source = {"source": "samples", "model": settings["model"], "seed": settings["seed"]}
        fill_dataset(temporary, _pictures(parts, rows), source, size, channels, packed=size <= PACKED_UP_TO)
        rgb = (np.broadcast_to(images, (*images.shape[:3], 3)) for images in _read_parts(parts))
        write_archive(temporary / "samples.npz", rgb, (n, size, size, 3), positions)
        write_grid(temporary / "grid.png", _grid_rows(parts, positions, len(classes)), list(classes))
        write_json(temporary / "samples.json", {**settings, **(facts or {}), "device": device.type})
    shutil.rmtree(parts)
    events.image("grid", Path(out_folder) / "grid.png")


def write_class_grid(
    path: Path, model: Model, names: Sequence[str], columns: int, sampling: Sampling, seed: int, device: torch.device
) -> None:
    """Draw the first `columns` images of each of these classes and write them as one PNG, a row per class."""
    labels = [model.classes.index(name) for name in names for _ in range(columns)]
    images = draw(model, labels, [*range(columns)] * len(names), sampling, seed, device)
    write_grid(path, np.split(images, len(names)), names)


def assist(model: Model, config: Config, classes: Sequence[str], n: int, team: Team) -> None:
    """The part of every rank but the first in `sample`: draws its share of the batches, and writes nothing."""
    team.require_same(_settings(model, config, classes, n))
    list(team.map(_batches(model, config, balanced(classes, n))))


def _settings(model: Model, config: Config, classes: Sequence[str], n: int) -> dict[str, Any]:
    settings = {"seed": config.experiment.seed, "n": n, "classes": list(classes), **asdict(config.sampling)}
    settings["steps"], settings["guidance_scale"] = steps_and_guidance(config.sampling, model.family)
    # resolve auto: one folder must never mix images of two precisions
    precision = pick_precision(config.sampling.precision, model.device, "sampling.precision")
    return settings | {"precision": precision_name(precision), "model": model_fingerprint(model)}


def _batch_size(config: Config, rows: Sequence[tuple[str, int]]) -> int:
    return min(config.sampling.batch_size, len(rows))


def _batches(
    model: Model, config: Config, rows: list[tuple[str, int]]
) -> Callable[[int], tuple[int, NDArray[np.uint8]]]:
    """A function that takes a batch's first row, and returns this row and the batch's images."""
    device, batch_size = model.device, _batch_size(config, rows)
    labels, indices = [model.classes.index(name) for name, _ in rows], [index for _, index in rows]

    def drawn(start: int) -> tuple[int, NDArray[np.uint8]]:
        # fill the last batch from the front: equal batch sizes give equal bits for any n
        wanted = [row % len(rows) for row in range(start, start + batch_size)]
        images = draw(
            model,
            [labels[r] for r in wanted],
            [indices[r] for r in wanted],
            config.sampling,
            config.experiment.seed,
            device,
        )
        return start, images[: len(rows) - start]

    return drawn


def _draw_parts(
    model: Model, config: Config, rows: list[tuple[str, int]], parts: Path, events: Events, team: Team
) -> None:
    batch_size = _batch_size(config, rows)
    starts = range(0, len(rows), batch_size)
    missing = [start for start in starts if not _part(parts, start).exists()]
    done = len(rows) - sum(len(rows[start : start + batch_size]) for start in missing)
    if done:
        events.message(f"sampling: {done} of {len(rows)} images are there from an earlier run")
    began = time.monotonic()
    with progress(total=len(rows), initial=done, desc="samples", unit="image") as bar:
        for start, images in team.map(_batches(model, config, rows), missing):
            with whole_file(_part(parts, start)) as temporary:
                np.save(temporary, images)
            bar.update(len(images))
    if missing:
        events.metric("images_per_second", (len(rows) - done) / (time.monotonic() - began))


def _part(parts: Path, start: int) -> Path:
    return parts / f"from-{start:08d}.npy"


def _read_parts(parts: Path) -> Iterator[NDArray[np.uint8]]:
    for path in sorted(parts.glob("from-*.npy")):
        yield np.load(path, allow_pickle=False)


def _pictures(parts: Path, rows: list[tuple[str, int]]) -> Iterator[Picture]:
    images = (image for part in _read_parts(parts) for image in part)
    for (name, _), image, row in zip(rows, images, range(len(rows)), strict=True):
        # numbered, not named by class: a class name may be any text
        yield Picture(f"{row:06d}.png", name, SPLIT, encode_png(image))


def _grid_rows(parts: Path, positions: NDArray[np.int64], classes: int) -> list[NDArray[np.uint8]]:
    chosen: list[list[NDArray[np.uint8]]] = [[] for _ in range(classes)]
    images = (image for part in _read_parts(parts) for image in part)
    for position, image in zip(positions, images, strict=True):
        if len(chosen[position]) < GRID_COLUMNS:
            chosen[position].append(image)
    shape = next(_read_parts(parts)).shape[1:]
    return [np.stack(row) if row else np.zeros((0, *shape), np.uint8) for row in chosen]
