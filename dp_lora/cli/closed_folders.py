"""Close the folders that hold private files to everybody but their owner."""

from dp_lora.cli.pipelines import RUNS, outputs
from dp_lora.config import ROOT, Config
from dp_lora.files import private_folder


def close_folders(config: Config) -> None:
    """Give data/, runs/, an experiment's outputs and DVC's own cache mode 0700: nobody but their owner may enter.

    Our commands write private files with mode 0600. DVC's copies, in the tree and in its cache, are readable by all,
    but DVC keeps the mode of the folder above them. A user who moves the cache elsewhere has to close it there.
    """
    for folder in (ROOT / "data", RUNS, outputs(config), ROOT / ".dvc" / "cache"):
        if folder.is_dir():
            private_folder(folder)
