"""Counts of the networks of shipped configs; a dry run without a base reads them.

`python -m tests.support.counted` writes them to dp_lora/models/counted.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dp_lora.config import ROOT, Config, load
from dp_lora.models.flops import count_operations
from dp_lora.models.meta import meta_networks, tensor_shapes
from dp_lora.models.shipped import FOLDER, file_of

# one config of each kind of network; a test checks that no other config needs a file of its own
KINDS = ("mnist5k", "celebahq-eps10", "mnist32-class-dp-eps10")


def recount(config: Config) -> dict[str, Any]:
    """The content of the config's file, counted on networks without weights."""
    denoiser, vae = meta_networks(config, ROOT / "no such base")
    shapes = {"denoiser": tensor_shapes(denoiser), "vae": tensor_shapes(vae)}  # counting changes the networks
    return json.loads(json.dumps({**shapes, "operations": asdict(count_operations(denoiser, vae))}))


def write(folder: Path = FOLDER) -> None:
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.json"):
        old.unlink()
    for name in KINDS:
        config = load(name)
        text = json.dumps(recount(config), sort_keys=True, separators=(",", ":"))
        file_of(config).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
