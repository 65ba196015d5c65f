"""Folders that many tests need: a process makes each once, and copies it from then on."""

import shutil
from collections.abc import Callable, Hashable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# key -> the folder, which is removed when the process ends, and the value that `make` returned
MADE: dict[Hashable, tuple[TemporaryDirectory, Any]] = {}


def from_template(folder: Path, key: Hashable, make: Callable[[Path], Any]) -> Any:
    """Fill `folder` as `make` does, and return the value of `make`; `key` names everything that `make` depends on.

    Replaces an older `folder`.
    """
    if key not in MADE:
        made = TemporaryDirectory(prefix="dp-lora-test-")
        MADE[key] = made, make(Path(made.name) / "made")
    made, returned = MADE[key]
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(Path(made.name) / "made", folder)
    return returned
