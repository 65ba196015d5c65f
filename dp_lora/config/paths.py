"""The project's root, and the form in which paths are shown."""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from dp_lora.errors import InputError
from dp_lora.files import PACKAGE

IN_CLONE = (PACKAGE.parent / "MLproject").is_file()
# an installed package works in the current folder: data, runs and store lie there
ROOT = PACKAGE.parent if IN_CLONE else Path.cwd()
# `dvc exp run --queue` or `--temp` works in a copy that DVC deletes: files that must outlive it lie in the project
DVC_COPIES = ".dvc/tmp/exps"
DP_LORA = ".venv/bin/dp-lora" if IN_CLONE else "dp-lora"  # the console command, as users type it


def kept_root(root: Path) -> Path:
    """The project that keeps ledgers, keys and the store of work in `root`: `root`, or the project that DVC copied."""
    project, copied, _ = root.as_posix().partition(f"/{DVC_COPIES}/")
    return Path(project) if copied else root


PROJECT = kept_root(ROOT)


def relative(path: Path) -> str:
    """A path as shown and recorded: relative to the project's root if it lies below."""
    path = Path(os.path.abspath(path))
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def require_clone(what: str) -> None:
    """Raise InputError outside a clone: `what` needs DVC's pipelines (dvc.yaml and the stages beside it)."""
    if not IN_CLONE:
        raise InputError(f"{what}: needs a clone of the project, with its dvc.yaml and MLproject; type it there")


def require_own_clone() -> None:
    """Raise InputError in a clone that this package is not of: results would go to the package's own, unseen."""
    here = Path.cwd()
    if (
        IN_CLONE
        and here.resolve() != ROOT.resolve()
        and all((here / name).exists() for name in ("MLproject", "dp_lora"))
    ):
        what = "another clone than this command's"
        raise InputError(f"{here}: {what}, {ROOT}; use the command of its own .venv", what)


def typed_command(stage: str, parameters: Mapping[str, str]) -> str:
    """The command that runs a stage with these parameters: by MLflow in a clone, else the console command."""
    if IN_CLONE:
        words = [".venv/bin/mlflow", "run", ".", "-b", "native", "-e", stage]
        return shlex.join(words + [word for name, value in parameters.items() for word in ("-P", f"{name}={value}")])
    return shlex.join([DP_LORA, stage, *(word for name, value in parameters.items() for word in (f"--{name}", value))])
