"""Files that are whole or absent: write to a temporary name, fsync, rename. Lines that are. Digests of both."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dp_lora.errors import InputError

PACKAGE = Path(__file__).resolve().parent
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room: on the disk, in a quota, below a limit on files' sizes
# how libraries that write in their own way, and shutil's list of errors, tell the number of one of the system's
NUMBERED = re.compile(r"(?:os error |errno )(\d+)", re.IGNORECASE)
SQLITE_FULL = "database or disk is full"  # SQLite tells no number of the system's
SYNCED_BY_ONE = 200  # entries of a folder that are made durable one by one: 3,000 took 17 seconds so, 0.3 by one call


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Make a disk-full error name `path`: an error of a write to an open file names none, a copy's names its source.

    Inside, `path`, or what lies in it, is written by whatever library; its error for want of room, in its own words,
    becomes an OSError. All other errors pass.
    """
    try:
        yield
    except Exception as error:
        number = full_disk(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def full_disk(error: BaseException) -> int | None:
    """The number, one of FULL, of a disk-full error; None for every other error."""
    if isinstance(error, InputError):  # it has its own words, and says what to do
        return None
    if SQLITE_FULL in str(error):
        return errno.ENOSPC
    known = getattr(error, "errno", None)
    found = NUMBERED.search(str(error)) if known is None else None
    number = known if found is None else int(found[1])
    return number if number in FULL else None


def reserve(path: Path) -> None:
    """Reserve the blocks of a file, as long as it is, on the disk. Raises OSError, for a full disk too, naming it.

    Without them a write to its mapped pages ends the process by SIGBUS where the disk is full, without a line.
    """
    with naming_full_disk(path), path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)


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

    A `private` one is readable by its owner alone, also while it is written; any other one follows the umask.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the suffix is kept: writers such as numpy and PIL choose their format, or append an ending, by it
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}")
    try:
        with naming_full_disk(path):
            temporary.touch(0o600 if private else 0o666)  # a writer that opens an existing file keeps its mode
            mode = temporary.stat().st_mode & 0o777
            yield temporary
            temporary.chmod(mode)  # some writers put a file of their own there, 0600
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path, *, private: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it replaces `path`, on failure it is removed.

    A `private` one, and all in it, is its owner's alone, also while it is written; any other one follows the umask.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir(0o700 if private else 0o777)
    try:
        with naming_full_disk(path):
            yield temporary
            publish(temporary, path, private=private)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(built: Path, folder: Path, *, private: bool = False) -> None:
    """Let a finished folder take the place of `folder`; what lies in it is on disk before.

    Files of a `private` one are 0600 in folders 0700. Those of another one have the mode of `built`, but cannot be run.
    """
    if private:
        close_to_others(built)
    else:
        _set_modes(built, built.stat().st_mode & 0o777)  # which follows the umask
    inside = list(built.rglob("*"))
    if len(inside) > SYNCED_BY_ONE:
        os.sync()
    else:
        for path in [*inside, built]:
            fsync(path)
    if folder.exists():
        shutil.rmtree(folder)
    built.replace(folder)
    fsync(folder.parent)


def append_line(path: Path, line: str) -> None:
    """Append `line` to a file of its owner's alone; on return it is on the disk, and after an error it is not there.

    A last line that was torn in a crash keeps its place: it is ended first.
    """
    created = not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        torn = size and os.pread(descriptor, 1, size - 1) != b"\n"
        content = f"{chr(10) if torn else ''}{line}\n".encode()
        with naming_full_disk(path):
            if os.write(descriptor, content) != len(content):
                os.ftruncate(descriptor, size)
                os.fsync(descriptor)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if created:
        fsync(path.parent)


def private_folder(path: Path) -> Path:
    """Make the folder `path` where it is missing, and let nobody but its owner into it, whatever lies there."""
    path.mkdir(0o700, parents=True, exist_ok=True)
    with suppress(PermissionError):  # of another user: its owner decides
        path.chmod(0o700)
    return path


def close_to_others(folder: Path) -> None:
    """Folders 0700 and files 0600, `folder` and all below it."""
    _set_modes(folder, 0o700)


def _set_modes(folder: Path, mode: int) -> None:
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(mode if path.is_dir() else mode & 0o666)


@contextmanager
def exclusive(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Lock the file `path`, made where it is not there and not changed; the lock ends with the process.

    The file stays: if it were removed, whoever waits for it would hold a file that the next one does not see. So `path`
    lies in no folder that its holder removes.

    Where another process holds it: BlockingIOError, or with `wait` only when that one is done.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
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
