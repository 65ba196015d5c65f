"""The size of the code: files and lines of Python per folder, so that its growth is seen."""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("dp_lora", "entrypoints", "benchmarks", "tests")
CORE = ("dp_lora", "entrypoints")


def sizes(lines: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """Rows (room, files, lines), in order of the names; `lines` gives the number of lines of each file by its path.

    A room is a folder of dp_lora/, the files directly in dp_lora/, or any other folder as a whole. The last three rows
    are the sums of dp_lora, of dp_lora and entrypoints, and of all.
    """
    rooms: dict[str, list[int]] = {}
    for path, count in lines.items():
        parts = PurePosixPath(path).parts
        room = "/".join(parts[:2]) if parts[0] == "dp_lora" and len(parts) > 2 else parts[0]
        rooms.setdefault(f"{room}/*.py" if room == "dp_lora" else room, []).append(count)
    rows = [(room, len(counts), sum(counts)) for room, counts in sorted(rooms.items())]
    for name, tops in (("all of dp_lora", CORE[:1]), ("dp_lora and entrypoints", CORE), ("all", FOLDERS)):
        counts = [count for path, count in lines.items() if PurePosixPath(path).parts[0] in tops]
        rows.append((name, len(counts), sum(counts)))
    return rows


def main() -> None:
    """Print the table."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    lines = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    print(f"{'room':<24}{'files':>6}{'lines':>8}")
    for room, count, total in sizes(lines):
        print(f"{room:<24}{count:>6}{total:>8,}")


if __name__ == "__main__":
    main()
