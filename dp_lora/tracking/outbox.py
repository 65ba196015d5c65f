"""Records of a run that its tracking server has not taken yet, on disk in the order in which they were made.

Each record is a folder NUMBER/ with record.json and, in files/, an artifact's files: whole or absent. It is removed
after it was sent. One process at a time opens a run's outbox: its lock lies beside the run's folder, and stays.
"""

import shutil
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dp_lora.config import PROJECT
from dp_lora.errors import InputError
from dp_lora.files import exclusive, read_json, whole_folder, write_json
from dp_lora.tracking.records import Record

OUTBOX = PROJECT / "runs" / "outbox"  # one folder per run
RECORD = "record.json"  # a folder without it is a sent record, whose removal was cut short


class Outbox:
    """The waiting records of a run whose outbox is open (`open_outbox`)."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._waiting = deque(sorted(path.parent for path in folder.glob(f"[0-9]*/{RECORD}")))

    def __len__(self) -> int:
        return len(self._waiting)

    def append(self, record: Record) -> None:
        """Append a record; the file or folder of an artifact is copied."""
        number = int(self._waiting[-1].name) + 1 if self._waiting else 1
        path = self._folder / f"{number:08d}"
        with whole_folder(path, private=True) as temporary:
            name = None
            if record.path is not None:
                name = record.path.name
                copy = shutil.copytree if record.path.is_dir() else shutil.copyfile
                (temporary / "files").mkdir()
                copy(record.path, temporary / "files" / name)
            write_json(temporary / RECORD, {"kind": record.kind, "content": record.content, "name": name})
        self._waiting.append(path)

    def first(self) -> Record | None:
        """The oldest waiting record. Raises InputError if its file is damaged."""
        return _read(self._waiting[0]) if self._waiting else None

    def last(self) -> Record | None:
        """The newest waiting record. Raises InputError if its file is damaged."""
        return _read(self._waiting[-1]) if self._waiting else None

    def remove_first(self) -> None:
        """Remove the oldest record: it was sent."""
        path = self._waiting.popleft()
        # RECORD first: the removal of a folder may be cut short
        (path / RECORD).unlink()
        shutil.rmtree(path)


def _read(path: Path) -> Record:
    try:
        found = read_json(path / RECORD)
        return Record(found["kind"], found["content"], path / "files" / found["name"] if found["name"] else None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__})") from None


@contextmanager
def open_outbox(run_id: str, *, wait: bool = False) -> Iterator[Outbox]:
    """Open the outbox of a run, for this process alone; an empty one is removed at the end.

    If another process has it open, raises BlockingIOError; with `wait`, waits until that process is done.
    """
    folder = OUTBOX / run_id
    with exclusive(folder.with_name(f".{run_id}.lock"), wait=wait):
        outbox = Outbox(folder)
        yield outbox
        if not outbox and folder.exists():
            shutil.rmtree(folder)


def waiting_runs() -> list[str]:
    """Ids of the runs whose records wait on this machine."""
    return sorted({path.parents[1].name for path in OUTBOX.glob(f"*/[0-9]*/{RECORD}")})
