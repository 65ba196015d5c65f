"""Where the project lies, and how its paths are shown."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def relative(path: Path) -> str:
    """A path as shown and recorded: from the project's root where it lies below it."""
    path = Path(os.path.abspath(path))
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)
