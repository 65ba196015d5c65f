"""Reports of long work to its caller: scalars, pictures and lines. The core does not know who listens."""

import sys
from pathlib import Path


class Events:
    """A listener that prints messages and forgets the rest; tracking overrides what it wants to keep."""

    def metric(self, name: str, value: float, step: int | None = None) -> None:
        """A scalar; names under `private/` depend on private data without noise."""

    def image(self, name: str, path: Path, *, private: bool = False) -> None:
        """A picture file to show under `name`; a `private` one depends on private data without noise."""

    def terminal(self, text: str) -> None:
        """One line for the operator's terminal alone: it depends on private data, or on who was in earlier ones."""
        print(text, file=sys.stderr, flush=True)

    def message(self, text: str) -> None:
        """One line for whoever watches."""
        print(text, file=sys.stderr, flush=True)
