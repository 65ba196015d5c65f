"""`prepare` of a Hugging Face dataset beside plain pyarrow and file writes: time, and peak memory as rows grow."""

import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.tables import markdown, write_report
from dp_lora.config import ROOT
from dp_lora.data.png import encode_png

CLASSES = ("female", "male")
FOLDER = ROOT / "runs" / "bench-prepare"
BOUND = 1.3  # times plain
GIB = 2**30


def make_file(path: Path, rows: int, size: int, group: int) -> None:
    """Write a Parquet file of random pictures, group by group."""
    rng = np.random.default_rng(0)
    pool = [encode_png(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(64)]
    schema = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())])
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, schema, use_dictionary=False) as writer:
        for start in range(0, rows, group):
            places = range(start, min(rows, start + group))
            images = [{"bytes": pool[row % len(pool)], "path": f"{row}.png"} for row in places]
            writer.write_table(pa.table({"image": images, "label": [row % 2 for row in places]}, schema=schema))


def plain(path: Path, folder: Path) -> None:
    """Extract in the simplest way: record batches, a file per picture, metadata; no checks, no resuming."""
    folder.mkdir(parents=True)
    names, labels = [], []
    for batch in pq.ParquetFile(path).iter_batches():
        for image, label in zip(batch["image"].to_pylist(), batch["label"].to_pylist(), strict=True):
            name = f"{len(names):06d}.png"
            with open(f"{folder}/{name}", "wb") as out:
                out.write(image["bytes"])
            names.append(name)
            labels.append(CLASSES[label])
    pq.write_table(pa.table({"file_name": names, "label": labels}), folder.parent / "metadata.parquet")


def ours(path: Path, folder: Path, size: int) -> None:
    """Extract as `prepare` does, on all cores, to the finished dataset."""
    from dp_lora.data.extraction import extract, read_record
    from dp_lora.data.layout import write_index
    from dp_lora.data.parquet import Wanted, open_file

    wanted = Wanted("image", "label", tuple(CLASSES), size, 3)
    file = open_file(path.name, path, "train", wanted)
    record = folder.parent / "rows.jsonl"
    extract([file], wanted, folder, record, 0, "ours")
    rows = ([row.file_name, row.label, row.split, row.sha256] for row in read_record(record))
    write_index(folder.parent, rows, {"name": "benchmark"}, size, 3)


def _measured(which: str, path: Path, size: int) -> tuple[float, float, float]:
    """Run one way in a process of its own: its seconds, seconds of all cores, peak GiB of its largest process."""
    folder = FOLDER / "out"
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()
    command = [sys.executable, "-m", "benchmarks.prepare", "--one", which, "--file", str(path), "--size", str(size)]
    found = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    seconds, cores, kibibytes = map(float, found.stdout.split())
    return seconds, cores, kibibytes * 1024 / GIB


def _one(which: str, path: Path, size: int) -> None:
    folder = FOLDER / "out" / "images"
    if which == "ours":
        # import before the clock starts, as for `plain`; the clock includes the start of the workers
        import dp_lora.data.extraction
        import dp_lora.data.layout  # noqa: F401
    began = time.perf_counter()
    plain(path, folder) if which == "plain" else ours(path, folder, size)
    seconds = time.perf_counter() - began
    # not ru_maxrss of this process: that number begins at the peak of its parent
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    own, workers = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    cores = sum(usage.ru_utime + usage.ru_stime for usage in (own, workers))
    print(seconds, cores, max(int(status["VmHWM"].split()[0]), workers.ru_maxrss))


@click.command()
@click.option("--rows", default=30_000, help="pictures of the timing")
@click.option("--rounds", default=5, help="interleaved rounds; the medians are compared")
@click.option("--size", default=32, help="pixels of a picture's side, in the timing")
@click.option("--memory-rows", default=1_500, help="pictures of 128 pixels at 1x")
@click.option("--factors", default="1,5,20", help="multiples of --memory-rows")
@click.option("--one", hidden=True, type=click.Choice(["plain", "ours"]))
@click.option("--file", "path", hidden=True, type=click.Path(path_type=Path))
def main(rows: int, rounds: int, size: int, memory_rows: int, factors: str, one: str | None, path: Path | None) -> None:
    """Print both tables; exit 1 where `prepare` takes more than 1.3 times plain, or its memory grows with the rows."""
    if one is not None and path is not None:
        _one(one, path, size)
        return
    file = FOLDER / "time.parquet"
    make_file(file, rows, size, 1000)
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    cores: dict[str, list[float]] = {"plain": [], "ours": []}
    for _ in range(rounds):
        for which, found in seconds.items():
            wall, of_cores, _ = _measured(which, file, size)
            found.append(wall)
            cores[which].append(of_cores)
    medians = {which: statistics.median(found) for which, found in seconds.items()}
    ratio = medians["ours"] / medians["plain"]
    shown = []
    for which, found in seconds.items():
        median, of_cores = medians[which], statistics.median(cores[which])
        row = [which, f"{median:.2f}", f"{rows / median:.0f}", f"{of_cores:.2f}", ", ".join(f"{s:.2f}" for s in found)]
        shown.append(row)
    header = [f"{rows:,} pictures of {size} pixels", "median (s)", "images/s", "all cores (s)", "rounds (s)"]
    text = markdown(header, shown)
    text += f"\nours / plain: {ratio:.2f} (at most {BOUND})\n\n"
    peaks = []
    for factor in map(int, factors.split(",")):
        # the worst case for a reader: all rows in one row group
        make_file(FOLDER / "memory.parquet", memory_rows * factor, 128, memory_rows * factor)
        peaks.append((factor, _measured("ours", FOLDER / "memory.parquet", 128)[2]))
    table = [[f"{factor}x", f"{memory_rows * factor:,}", f"{1024 * peak:.0f}"] for factor, peak in peaks]
    text += markdown(
        ["rows", "pictures of 128 pixels, one row group", "peak memory of the largest process (MiB)"], table
    )
    write_report("prepare", text)
    shutil.rmtree(FOLDER)
    growth = peaks[-1][1] / peaks[0][1]
    if ratio > BOUND or peaks[-1][1] > 1 or growth > 1.25:
        print(f"missed: time {ratio:.2f} of {BOUND}, memory {peaks[-1][1]:.2f} GiB, grown {growth:.2f} times")
        sys.exit(1)


if __name__ == "__main__":
    main()
