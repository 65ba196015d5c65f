"""A copy of the project with a tiny experiment of the EMNIST pipeline, and tiny data for it."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import yaml

from dp_lora.config import ROOT
from dp_lora.data.layout import Picture, write_dataset
from dp_lora.data.png import encode_png
from dp_lora.files import write_json
from tests.support.prepare_call import clone, commit_all
from tests.support.tiny import tiny_config, tiny_dataset

LITTLE = (
    "autoencoder.epochs=1 autoencoder.batch_size=6 ldm.epochs=1 ldm.batch_size=6 sampling.n=8 "
    "evaluation.classifier_steps=2 evaluation.min_images=4"
)
EMNIST = (
    "public.source=emnist public.folder=data/emnist data.source=mnist data.folder=data/mnist "
    "model.base=outputs/emnist/ldm"
)


def project_with_a_tiny_experiment(folder: Path) -> Path:
    """A git and DVC repository of its own, with the experiment `emnist-tiny`."""
    clone(ROOT, folder)
    sections = asdict(tiny_config(f"{LITTLE} {EMNIST}"))
    del sections["experiment"]["name"]
    (folder / "configs/emnist-tiny.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
    commit_all(folder)
    return folder


def emnist_and_mnist(project: Path) -> None:
    """Write tiny data in the place of what `prepare` downloads; `prepare` has tests of its own."""

    def letters():
        for index in range(12):
            image = np.random.default_rng(index).integers(0, 256, (16, 16, 1), dtype=np.uint8)
            yield Picture(f"{index}.png", "ABC"[index % 3], "train" if index < 9 else "test", encode_png(image))

    write_dataset(project / "data/emnist", letters(), {"source": "test"}, 16, 1, packed=True)
    tiny_dataset(project / "data/mnist")
    for folder in ("emnist", "mnist"):
        write_json(project / "data" / folder / "source.json", {"origin": "test"})
