"""Identical pictures of a private dataset: each copy counts as one unit, and no accountant notices.

A picture with n copies is protected as a group of n units, not as one. Copies across the split make scores too good.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dp_lora.errors import PRIVATE_PICTURE, InputError, private_names
from dp_lora.events import Events

GROUPS, MEMBERS = 5, 4  # most groups that a message names, and most pictures of each
MEANING = "each copy counts as one unit, so n copies are protected as a group of n alone (docs/privacy.md, Units)"


def identical_pictures(folder: Path) -> list[list[dict[str, Any]]]:
    """Groups of rows of a dataset's metadata.parquet whose pictures have the same bytes, in the order of their index.

    Compares the stored bytes: a crop, another size or another encoding of a picture goes unnoticed.
    """
    with pq.ParquetFile(folder / "metadata.parquet") as file:
        table = file.read()
    counts = pc.value_counts(table["sha256"])
    several = pc.filter(counts.field("values"), pc.greater(counts.field("counts"), 1))
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in table.filter(pc.is_in(table["sha256"], pa.array(several))).to_pylist():
        groups.setdefault(row["sha256"], []).append(row)
    return list(groups.values())


@private_names(PRIVATE_PICTURE)
def check_copies(folder: Path, duplicates: str, events: Events) -> None:
    """Name identical pictures in a prepared dataset to the operator; `duplicates` is data.duplicates.

    "warn" prints them on the terminal alone, since names and counts are private. "refuse" raises InputError, one line.
    """
    groups = identical_pictures(folder)
    if not groups:
        return
    lines = [*map(_group, groups[:GROUPS]), *([f"and {len(groups) - GROUPS} more"] if len(groups) > GROUPS else [])]
    if duplicates == "refuse":
        raise InputError(
            f"data.duplicates=refuse: {_counted(groups)}: {'; '.join(lines)}: leave one of each in the source, and "
            "prepare it again"
        )
    events.terminal(f"identical pictures: {_counted(groups)}; {MEANING}; data.duplicates=refuse stops here")
    for line in lines:
        events.terminal(f"  {line}")


def _counted(groups: list[list[dict[str, Any]]]) -> str:
    """The number of pictures and groups, and how many groups lie in training or cross splits, classes, persons."""

    def crossing(column: str) -> int:
        return sum(len({row.get(column) for row in group}) > 1 for group in groups)

    in_training = sum(sum(row["split"] == "train" for row in group) > 1 for group in groups)
    kinds = {"in training": in_training, "across the split": crossing("split"), "across classes": crossing("label")}
    if "person" in groups[0][0]:
        kinds["across persons"] = crossing("person")
    counted = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
    number = f"{len(groups)} group{'s' if len(groups) > 1 else ''}"
    return f"{sum(map(len, groups))} pictures in {number} ({counted})"


def _group(group: list[dict[str, Any]]) -> str:
    members = [
        f"{row['file_name']!r} ({', '.join(str(row[name]) for name in ('label', 'person', 'split') if name in row)})"
        for row in group[:MEMBERS]
    ]
    return " = ".join(members) + (f" = {len(group) - MEMBERS} more" if len(group) > MEMBERS else "")
