"""A table in the forms of a report: rows of words for people, Markdown, CSV."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dp_lora.files import whole_file

LONG = 40  # letters from which a cell may be broken anywhere


@dataclass(frozen=True)
class Cell:
    """Words, their link (empty: none), and the small print below them."""

    text: str
    link: str = ""
    detail: str = ""

    @property
    def long(self) -> bool:
        return len(self.text) > LONG


@dataclass(frozen=True)
class Table:
    """A header and rows of as many cells."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def markdown(self) -> str:
        """In GitHub's Markdown; Markdown's signs in a name are escaped."""
        lines = [_line(map(_escaped, self.header)), _line(["---"] * len(self.header))]
        return "\n".join([*lines, *(_line(map(_linked, row)) for row in self.rows)])


def table(header: Sequence[str], rows: Sequence[Sequence[str | Cell]]) -> Table:
    """A table of words, of which some are cells with links."""
    return Table(header, [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _linked(cell: Cell) -> str:
    text = f"[{_escaped(cell.text)}]({cell.link})" if cell.link else _escaped(cell.text)
    return f"{text} ({_escaped(cell.detail)})" if cell.detail else text


def _escaped(text: str) -> str:
    for sign in "\\|<>[]*_`":
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the union of their keys as the header, whole or not at all, for the owner's eyes alone.

    None and missing are empty.
    """
    header = list(dict.fromkeys(key for row in rows for key in row))
    with whole_file(path, private=True) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
