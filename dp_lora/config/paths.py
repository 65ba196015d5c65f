"""Where the project lies, and how its paths are shown."""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from dp_lora.errors import InputError
from dp_lora.files import PACKAGE

IN_CLONE = (PACKAGE.parent / "MLproject").is_file()
# an installed package works in the folder that it is called in: its data, runs and store lie there
ROOT = PACKAGE.parent if IN_CLONE else Path.cwd()
# a run of `dvc exp run --queue` or `--temp` works in a copy that DVC deletes: what must outlive it lies in the project
DVC_COPIES = ".dvc/tmp/exps"
DP_LORA = ".venv/bin/dp-lora" if IN_CLONE else "dp-lora"  # the console command, as users type it


def kept_root(root: Path) -> Path:
    """The project that keeps ledgers, keys and the store of work in `root`: that itself, or what DVC copied it from."""
    project, copied, _ = root.as_posix().partition(f"/{DVC_COPIES}/")
    return Path(project) if copied else root


PROJECT = kept_root(ROOT)


def relative(path: Path) -> str:
    """A path as shown and recorded: from the project's root where it lies below it."""
    path = Path(os.path.abspath(path))
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def require_clone(what: str) -> None:
    """InputError outside of a clone, for `what` needs DVC's pipelines: dvc.yaml and the stages beside it."""
    if not IN_CLONE:
        raise InputError(f"{what}: needs a clone of the project, with its dvc.yaml and MLproject; type it there")


def typed_command(stage: str, parameters: Mapping[str, str]) -> str:
    """What users type to run a stage with these parameters: by MLflow in a clone, else the console command."""
    if IN_CLONE:
        words = [".venv/bin/mlflow", "run", ".", "-b", "native", "-e", stage]
        return shlex.join(words + [word for name, value in parameters.items() for word in ("-P", f"{name}={value}")])
    return shlex.join([DP_LORA, stage, *(word for name, value in parameters.items() for word in (f"--{name}", value))])
