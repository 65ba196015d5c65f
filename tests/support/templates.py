"""Folders that many tests need alike: made once in a process, copied from then on."""

import shutil
from collections.abc import Callable, Hashable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# what was made -> its folder, which ends with the process, and what its making returned
MADE: dict[Hashable, tuple[TemporaryDirectory, Any]] = {}


def from_template(folder: Path, key: Hashable, make: Callable[[Path], Any]) -> Any:
    """`folder` as `make` writes it, and what `make` returns; `key` names everything that `make` depends on.

    What stood there is replaced.
    """
    if key not in MADE:
        made = TemporaryDirectory(prefix="dp-lora-test-")
        MADE[key] = made, make(Path(made.name) / "made")
    made, returned = MADE[key]
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(Path(made.name) / "made", folder)
    return returned
