"""The folders that private things lie in, closed to everybody but their owner."""

from dp_lora.cli.pipelines import RUNS, outputs
from dp_lora.config import ROOT, Config
from dp_lora.files import private_folder


def close_house(config: Config) -> None:
    """Let nobody but their owner into data/, runs/, an experiment's outputs and DVC's own cache: mode 0700.

    What our commands write of private things has modes of its own, but DVC checks files out, and keeps them in its
    cache, readable by all: it leaves the folder above as it finds it. A cache elsewhere is its owner's to close.
    """
    for folder in (ROOT / "data", RUNS, outputs(config), ROOT / ".dvc" / "cache"):
        if folder.is_dir():
            private_folder(folder)
