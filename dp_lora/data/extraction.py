"""Parquet files of pictures -> PNG files, on all cores; a killed extraction resumes.

A record holds one line of JSON per finished picture (file name, label, split, sha256, bytes, and captions where these
are wanted), in the order of the rows. A line is written after its picture, and trusted only where the picture's bytes
have that hash.
"""

import json
import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from dp_lora.data.parquet import PictureBatch, PictureFile, Wanted, read_batches
from dp_lora.data.picture_worker import begin, store, verified_rows
from dp_lora.errors import InputError
from dp_lora.files import naming_full_disk
from dp_lora.progress import progress

IN_FLIGHT = 1 << 27  # most bytes of pictures on their way to the workers
LINES = 512  # finished rows that are checked at a time


@dataclass(frozen=True)
class Row:
    """A finished picture."""

    file_name: str
    label: str | None
    split: str
    sha256: str
    size: int
    captions: Sequence[str] | None = None

    def line(self) -> bytes:
        """This row as a line of the record."""
        fields = [self.file_name, self.label, self.split, self.sha256, self.size]
        captions = [] if self.captions is None else [self.captions]
        return json.dumps([*fields, *captions]).encode() + b"\n"


def extract(files: Sequence[PictureFile], wanted: Wanted, images: Path, record: Path, keep: int, name: str) -> None:
    """Write every picture of the files to the folder `images`, and its line to `record`.

    Continues after the rows in `record`, at most `keep` of them. A picture is called SPLIT-ROW.png, its row counted in
    its split. In memory at a time: IN_FLIGHT bytes of pictures. Raises InputError for the first bad row; the rows
    before it stay finished.
    """
    images.mkdir(parents=True, exist_ok=True)
    total = sum(file.rows for file in files)
    with _workers() as (pool, workers):
        done = _trusted(record, images, keep, pool)
        batches = _batches(files, wanted, done)
        shown = progress(total=total, initial=done, desc=name, unit=" images")
        with naming_full_disk(record), record.open("ab") as lines, shown as bar:
            for rows in _stored(pool, workers, batches, wanted, images):
                lines.write(b"".join(row.line() for row in rows))
                lines.flush()
                bar.update(len(rows))


def read_record(record: Path) -> Iterator[Row]:
    """The finished rows, in their order; ends before a line that is not whole."""
    if record.exists():
        with record.open("rb") as lines:
            for line in lines:
                row = _row(line)
                if row is None:
                    return
                yield row


def _row(line: bytes) -> Row | None:
    try:
        return Row(*json.loads(line)) if line.endswith(b"\n") else None
    except (ValueError, TypeError):
        return None


def workers_of_this_machine() -> int:
    return len(os.sched_getaffinity(0))


@contextmanager
def _workers() -> Iterator[tuple[ProcessPoolExecutor, int]]:
    number = workers_of_this_machine()
    # spawn, not fork: a fork would copy MLflow's and Arrow's threads in an arbitrary state
    pool = ProcessPoolExecutor(number, mp_context=multiprocessing.get_context("spawn"), initializer=begin)
    try:
        yield pool, number
    except BrokenProcessPool:
        raise InputError("a worker process was killed, perhaps for want of memory; the same command goes on") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _trusted(record: Path, images: Path, keep: int, pool: ProcessPoolExecutor) -> int:
    """Cut the record after the last row that can be trusted; returns the number of rows that stay."""
    rows, offset = 0, 0
    if record.exists():
        with record.open("rb") as lines:
            while chunk := list(islice(lines, min(LINES, keep - rows))):
                found = [row for row in map(_row, chunk) if row is not None]
                good = pool.submit(verified_rows, images, [(row.file_name, row.sha256) for row in found]).result()
                rows, offset = rows + good, offset + sum(map(len, chunk[:good]))
                if good < len(chunk):
                    break
        with record.open("r+b") as lines:
            lines.truncate(offset)
    return rows


def _batches(files: Sequence[PictureFile], wanted: Wanted, done: int) -> Iterator[tuple[int, PictureBatch]]:
    """Batches of the rows after the first `done`, each with the place of its first row in its split."""
    placed: dict[str, int] = {}
    for file in files:
        start = placed.get(file.split, 0)
        placed[file.split] = start + file.rows
        skip = min(done, file.rows)
        done -= skip
        if skip < file.rows:
            for batch in read_batches(file, wanted, skip):
                yield start + batch.first, batch


def _stored(
    pool: ProcessPoolExecutor,
    workers: int,
    batches: Iterable[tuple[int, PictureBatch]],
    wanted: Wanted,
    images: Path,
) -> Iterator[list[Row]]:
    """Finished rows, batch by batch in order, while the workers are kept busy."""
    waiting: deque[tuple[list[str], PictureBatch, int, Future]] = deque()
    in_flight = 0

    def first() -> list[Row]:
        nonlocal in_flight
        names, batch, size, future = waiting.popleft()
        in_flight -= size
        rows = zip(names, batch.labels, batch.captions, future.result(), strict=True)
        return [
            Row(name, label, batch.file.split, digest, length, captions)
            for name, label, captions, (digest, length) in rows
        ]

    unread: InputError | None = None
    source = iter(batches)
    while True:
        try:
            start, batch = next(source)
        except StopIteration:
            break
        except InputError as error:
            # finish the good rows before the bad one first
            unread = error
            break
        size = sum(map(len, batch.pictures))
        while waiting and (in_flight + size > IN_FLIGHT or len(waiting) > 2 * workers):
            yield first()
        names = [f"{batch.file.split}-{row:06d}.png" for row in range(start, start + len(batch.pictures))]
        future = pool.submit(
            store, images, names, batch.pictures, wanted.size, wanted.channels, batch.file.name, batch.first
        )
        waiting.append((names, batch, size, future))
        in_flight += size
    while waiting:
        yield first()
    if unread is not None:
        raise unread
