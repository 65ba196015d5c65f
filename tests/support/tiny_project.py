"""A copy of the project with a tiny experiment, for tests that run the whole chain through the command line."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import yaml

from dp_lora.config import ROOT
from tests.support.prepare_call import clone
from tests.support.tiny import tiny_config

EXPERIMENT = "digits-tiny"
EPSILONS = ("1", "5", "10")
LITTLE = (
    "data.classes=[0,1] data.n_public=800 public.n=60 autoencoder.epochs=1 autoencoder.batch_size=12 ldm.epochs=1 "
    "ldm.batch_size=12 privacy.batch_size=80 privacy.epochs=1 train.grid_every=5 sampling.n=24 "
    "evaluation.classifier_steps=20 evaluation.min_images=4 compute.device=cpu"
)


def tiny_project(folder: Path) -> Path:
    """Make a git and DVC repository with EXPERIMENT: zeros and ones, and a model that trains in seconds."""
    sections = asdict(tiny_config(LITTLE))
    del sections["experiment"]["name"]
    sections["experiment"]["description"] = "Zeros and ones, for tests"
    clone(ROOT, folder)
    (folder / f"configs/{EXPERIMENT}.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
    return folder


def run(
    project: Path, *arguments: str, before: Sequence[str] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `python -m ARGUMENTS` in the project, with its own store; `before`: a command that starts it."""
    given = {**clean_environment(), "DPLORA_PYTHON": sys.executable, "DVC_NO_ANALYTICS": "1", **environment}
    command = [*before, sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=project, env=given, capture_output=True, text=True, check=False)


def clean_environment() -> Mapping[str, str]:
    """The environment without MLflow's variables: they would lead to another store."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
