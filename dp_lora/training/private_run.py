"""One rank's part of a private fine-tuning: read the inputs, encode the pictures, train on the latents."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dp_lora.config import relative
from dp_lora.config.schema import Config
from dp_lora.data.captions import texts_of
from dp_lora.data.conditions import encode_captions
from dp_lora.data.latents import encode_dataset
from dp_lora.data.layout import Dataset, read_dataset
from dp_lora.errors import PRIVATE_PICTURE, private_names
from dp_lora.events import Events
from dp_lora.models.adapters import ready_to_draw
from dp_lora.models.agreement import check_agreement
from dp_lora.models.device import pick_precision
from dp_lora.models.estimate import GRID_IMAGES
from dp_lora.models.folder import Model, load_model
from dp_lora.models.info import model_digest
from dp_lora.privacy.audit_record import audits_of
from dp_lora.sampling import write_class_grid
from dp_lora.team import Team
from dp_lora.training import finetune as training
from dp_lora.training.finetune import PrivateData, units_of
from dp_lora.training.resolved import Resolved, check_base, stated_info
from dp_lora.training.run_folder import RunFolder, binding, hardware

ENCODE_BATCH = 64  # the last batch is padded to this size


@dataclass(frozen=True)
class Inputs:
    """Inputs that a rank holds before its first step."""

    start: Resolved
    model: Model
    dataset: Dataset
    device: torch.device
    base: Mapping[str, str]  # `named_base`
    bound: dict[str, Any]  # `run_folder.binding`: identity of this fine-tuning and of its data


def named_base(start: Resolved) -> dict[str, str]:
    """The base as a release names it: path and digest; of a base on the Hub also its id, as `hub`, and its revision."""
    model = start.config.model
    on_hub = {} if model.revision is None else {"hub": model.base, "revision": model.revision}
    return {"path": start.base_name, "digest": model_digest(start.base), **on_hub}


def read_inputs(start: Resolved, device: torch.device, team: Team) -> Inputs:
    """Model and pictures of a fine-tuning on this rank's `device`.

    Raises InputError where they do not fit each other, and where the ranks of `team` hold different ones.
    """
    config = start.config
    if config.privacy.reproducible:
        torch.use_deterministic_algorithms(True)
    with private_names(PRIVATE_PICTURE):
        dataset = read_dataset(start.data, list(config.data.classes), "train")
    check_base(start)
    precision = pick_precision(config.compute.precision, device)
    model = load_model(start.base, device, precision)
    if model.pipeline is None:
        check_agreement(config.ldm, model.denoiser, model.scheduler, f"{relative(start.base)}'s")
    else:
        model = ready_to_draw(replace(model, info=stated_info(config, start.base)), config)
    dataset.require_shape(config.data.size, config.data.channels, "data")
    base = named_base(start)
    bound = binding(config, dataset.digest(), base["digest"], device.type, start.parent)
    # with two precisions or devices a gradient would depend on the unit's rank, and so on who else is drawn
    team.require_same((bound, precision, hardware(device)))
    return Inputs(start, model, dataset, device, base, bound)


def encode_and_train(inputs: Inputs, run: RunFolder, events: Events, team: Team) -> Path:
    """The first rank's part: encode, train in `run`, write the adapter's folder and return it.

    Guarantee: that of `finetune`.
    """
    config, device = inputs.start.config, inputs.device
    data = encoded(inputs, events, team)
    grid = partial(_grid, config, device)
    audits = audits_of(inputs.start.audits, run.plan, inputs.bound["code"])
    return training.finetune(config, inputs.model, inputs.base, data, run, device, events, grid, team, audits)


def encode_and_assist(inputs: Inputs, team: Team) -> None:
    """Every other rank's part: its share of encoding and of each step; it tracks, prints and writes nothing."""
    data = encoded(inputs, Events(), team)
    training.assist(inputs.start.config, inputs.model, data, inputs.device, team)


def encoded(inputs: Inputs, events: Events, team: Team) -> PrivateData:
    """The private training split, encoded for a fine-tuning by the ranks of `team` together."""
    dataset, start = inputs.dataset, inputs.start
    with private_names(PRIVATE_PICTURE):
        units = units_of(len(dataset), dataset.persons, start.config.privacy.unit)
        latents = encode_dataset(dataset, inputs.model.vae, start.latents, inputs.device, ENCODE_BATCH, events, team)
        captions = None
        if not inputs.model.family.of_classes:
            texts = texts_of(start.config, dataset)
            captions = encode_captions(start.config, texts, inputs.model, start.latents, team)
        return PrivateData(latents, dataset.labels, units, captions)


def _grid(config: Config, device: torch.device, model: Model, path: Path) -> None:
    write_class_grid(path, model, model.classes, GRID_IMAGES, config.sampling, config.experiment.seed, device)
