"""Files that are whole or absent: write to a temporary name, fsync, rename. Digests of files and folders."""

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def fsync(path: Path) -> None:
    """Make a file's bytes, or the renames inside a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path, *, private: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it there, on failure remove it.

    A `private` one is readable by its owner alone, also while it is written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the suffix is kept: writers such as numpy and PIL choose their format, or append an ending, by it
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}")
    try:
        if private:
            temporary.touch(0o600)  # who opens a file that is there to write it keeps its mode
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path, *, private: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it replaces `path`, on failure it is removed.

    A `private` one, and all in it, is its owner's alone, also while it is written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir(0o700 if private else 0o777)
    try:
        yield temporary
        if private:
            close_to_others(temporary)
        for inside in temporary.rglob("*"):
            fsync(inside)
        fsync(temporary)
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
        fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def private_folder(path: Path) -> Path:
    """Make the folder `path` where it is missing, and let nobody but its owner into it, whatever lies there."""
    path.mkdir(0o700, parents=True, exist_ok=True)
    with suppress(PermissionError):  # of another user: its owner decides
        path.chmod(0o700)
    return path


def close_to_others(folder: Path) -> None:
    """Folders 0700 and files 0600, `folder` and all below it."""
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o700 if path.is_dir() else 0o600)


@contextmanager
def exclusive(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path`, which ends with the process.

    Where another process holds it: BlockingIOError, or with `wait` only when that one is done.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def write_json(path: Path, value: Any, *, private: bool = False) -> None:
    """Write `value` as indented JSON, whole or not at all; `private` as for `whole_file`."""
    with whole_file(Path(path), private=private) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_folder(folder: Path) -> str:
    """SHA-256 over the sorted relative names and bytes of all files below `folder`."""
    total = hashlib.sha256()
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        total.update(f"{path.relative_to(folder).as_posix()}\0{digest_file(path)}\n".encode())
    return total.hexdigest()


def digest_value(value: Any) -> str:
    """SHA-256 of a JSON-able value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
