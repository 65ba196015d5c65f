"""The work of an extraction's processes. Light to import: each process imports it anew."""

import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

from dp_lora.data.png import as_png
from dp_lora.errors import InputError


def begin() -> None:
    """Leave Ctrl-C to the parent, and end when the parent ends, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def store(
    folder: Path, names: Sequence[str], pictures: Sequence[bytes], size: int, channels: int, file: str, first: int
) -> list[tuple[str, int]]:
    """Write pictures as PNG files; returns SHA-256 and number of bytes of each.

    `file` and `first` name the pictures' file and first row in errors. Raises InputError for the first picture that is
    broken, of another size, or cannot be written.
    """
    stored = []
    for row, (name, picture) in enumerate(zip(names, pictures, strict=True), start=first):
        try:
            png = as_png(picture, size, channels)
        except ValueError as error:
            raise InputError(f"{file}, row {row}: {error}") from None
        path = f"{folder}/{name}"
        try:
            _write(path, png)
        except OSError as error:
            remedy = f"{error.strerror}; make room, then the same command goes on"
            raise InputError(
                f"{file}, row {row}: {path}: {remedy}", public=f"a private picture cannot be written: {remedy}"
            ) from None
        stored.append((hashlib.sha256(png).hexdigest(), len(png)))
    return stored


def _write(path: str, data: bytes) -> None:
    # takes a third of a file object's time, which matters for tens of thousands of small pictures
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(descriptor, left) :]
    finally:
        os.close(descriptor)


def verified_rows(folder: Path, expected: Sequence[tuple[str, str]]) -> int:
    """Number of pairs (file name, SHA-256), from the first on, whose files lie unchanged in the folder."""
    for place, (name, digest) in enumerate(expected):
        try:
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
                return place
        except OSError:
            return place
    return len(expected)
