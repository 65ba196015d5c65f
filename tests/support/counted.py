"""Counts of the networks of shipped configs, and of rows of shipped studies; dry runs read them.

`python -m tests.support.counted` writes them to dp_lora/models/counted.
"""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dp_lora.config import ROOT, Config, load
from dp_lora.files import write_json
from dp_lora.models.counted_rows import COUNTED, row_key
from dp_lora.models.families import CLASSES
from dp_lora.models.flops import count_operations
from dp_lora.models.meta import meta_networks, tensor_shapes
from dp_lora.models.row_memory import count_row
from dp_lora.models.shapes import base_shapes
from dp_lora.models.shipped import FOLDER, file_of
from dp_lora.study.costs import largest_members
from dp_lora.study.grid import config_of, read_study

# one config of each kind of network; a test checks that no other config needs a file of its own
KINDS = ("mnist5k", "celebahq-eps10", "mnist32-class-dp-eps10")
STUDIES = ("mnist5k", "mnist", "celebahq", "standin")  # the shipped studies of these networks
NO_BASE = ROOT / "no such base"


def recount(config: Config) -> dict[str, Any]:
    """The content of the config's file, counted on networks without weights."""
    denoiser, vae = meta_networks(config, NO_BASE)
    shapes = {"denoiser": tensor_shapes(denoiser), "vae": tensor_shapes(vae)}  # counting changes the networks
    return json.loads(json.dumps({**shapes, "operations": asdict(count_operations(denoiser, vae))}))


def recount_rows(study: str) -> dict[str, Any]:
    """A row's memory of each member of `study` that its dry run names, counted on networks without weights."""
    configs = dict(enumerate(map(config_of, read_study(study).members)))
    starts: Any = {
        number: SimpleNamespace(config=config, base=NO_BASE, shapes=base_shapes(config, NO_BASE))
        for number, config in configs.items()
    }
    named = {row_key(configs[number]): configs[number] for number in largest_members(starts)}
    return {key: asdict(count_row(config, NO_BASE, CLASSES)) for key, config in named.items()}


def write(folder: Path = FOLDER) -> None:
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.json"):
        old.unlink()
    for name in KINDS:
        config = load(name)
        text = json.dumps(recount(config), sort_keys=True, separators=(",", ":"))
        file_of(config).write_text(text + "\n", encoding="utf-8")
    write_json(COUNTED, {key: row for study in STUDIES for key, row in recount_rows(study).items()})


if __name__ == "__main__":
    write()
