"""Faults of the operator's files, collected: one run names them all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dp_lora.errors import PRIVATE_PICTURE, InputError, private_names, shown
from dp_lora.events import Events

MOST = 100  # most faults that the terminal shows


class Faults:
    """Messages of the faults found so far."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note an InputError of the block, and go on after it."""
        try:
            yield
        except InputError as error:
            self.lines.append(str(error))

    @private_names(PRIVATE_PICTURE)
    def refuse(self, folder: Path, events: Events) -> None:
        """Raise InputError where there are faults; the terminal shows several, a line each."""
        if len(self.lines) == 1:
            raise InputError(self.lines[0])
        if self.lines:
            for line in self.lines[:MOST]:
                events.terminal(line)
            more = f", and there are {len(self.lines) - MOST} more" if len(self.lines) > MOST else ""
            raise InputError(
                f"data.path={shown(folder)}: the lines above name {min(len(self.lines), MOST)} files that cannot be "
                f"taken{more}; mend them or move them away, and type the same command again"
            )
