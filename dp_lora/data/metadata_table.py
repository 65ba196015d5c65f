"""The table of a user's folder: metadata.csv, metadata.jsonl or metadata.parquet, as diffusers and datasets read them.

Columns: file_name; label where the experiment has classes; person; the captions' column.
"""

import csv
import json
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dp_lora.config import Config
from dp_lora.data.captions import COLUMN, ListedPicture, of_a_table
from dp_lora.data.faults import Faults
from dp_lora.data.layout import safe_name
from dp_lora.data.persons import check_persons
from dp_lora.errors import PRIVATE_PICTURE, InputError, private_names, shown

NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
DELIMITERS = (",", ";", "\t")  # spreadsheets write semicolons where numbers have a decimal comma


@dataclass(frozen=True)
class Stated:
    """The config's public statements on the folder: data.classes, the unit, data.captions, data.caption_column."""

    classes: tuple[str, ...]
    by_person: bool = False
    captions: bool = False
    caption_column: str | None = None

    @classmethod
    def of(cls, config: Config) -> "Stated":
        data = config.data
        return cls(tuple(data.classes), config.privacy.unit == "person", data.captions, data.caption_column)


Rows = tuple[list[str], list[tuple[str, dict[str, Any]]]]  # the columns; where each row stands, and its fields


@private_names(PRIVATE_PICTURE)
def find_table(folder: Path) -> Path | None:
    """The one table of the folder; None where there is none. Raises InputError for two."""
    there = [folder / name for name in NAMES if os.path.lexists(folder / name)]
    if len(there) > 1:
        raise InputError(f"{shown(there[0])}: {there[1].name} lies beside it; which one counts? Move one away")
    return there[0] if there else None


@private_names(PRIVATE_PICTURE)
def read_table(table: Path, stated: Stated, faults: Faults) -> tuple[list[ListedPicture], bool]:
    """The pictures that a table names, unopened, and whether it has a column of captions.

    Lines at fault are noted in `faults`. Raises InputError for a table that cannot be read, or lacks a column.
    """
    read = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}[table.suffix]
    try:
        columns, rows = read(table)
    except UnicodeDecodeError:
        raise InputError(f"{shown(table)}: not UTF-8; save it as UTF-8") from None
    except (OSError, csv.Error, pa.ArrowException) as error:
        raise InputError(f"{shown(table)}: cannot be read: {' '.join(str(error).split())}") from None
    caption = _check_columns(table, columns, stated)
    words = ["label", "person"] if stated.classes else ["person"]
    present = [name for name in words if name in columns]
    listed = []
    for where, row in rows:
        with faults.noted():
            listed.append((where, _picture(table, where, row, present, caption)))
    with faults.noted():
        persons = ((where, picture.person) for where, picture in listed if picture.person is not None)
        check_persons(persons, shown(table))
    return [picture for _, picture in listed], caption is not None


def _check_columns(table: Path, columns: list[str], stated: Stated) -> str | None:
    """InputError for a column that is missing; returns the column of captions, None where there is none."""
    caption = stated.caption_column or COLUMN
    needed = {
        "file_name": "",
        **({"label": ""} if stated.classes else {}),
        **({"person": " (privacy.unit=person)"} if stated.by_person else {}),
        **({caption: " (data.caption_column)"} if stated.caption_column else {}),
    }
    for column, reason in needed.items():
        if column not in columns:
            mend = "its first line must name it" if table.suffix == ".csv" else f"it has {', '.join(columns)}"
            if column == "label" and caption in columns:
                mend += f"; with a base that takes text, data.captions=true takes the captions of column {caption!r}"
            raise InputError(f"{shown(table)}: no column {column!r}{reason}; {mend}")
    return caption if caption in columns else None


def _csv(table: Path) -> Rows:
    # utf-8-sig: spreadsheets write a byte order mark
    with table.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        file.seek(0)
        delimiter = next((d for d in DELIMITERS if "file_name" in _header(header, d)), ",")
        # skip blanks after a comma: they would split a quoted field in two
        reader = csv.reader(file, strict=True, delimiter=delimiter, skipinitialspace=True)
        columns = [name.strip() for name in next(reader, [])]
        rows = []
        for fields in reader:
            if not fields:  # an empty line
                continue
            where = f"line {reader.line_num}"
            if len(fields) != len(columns):
                raise InputError(f"{shown(table)}, {where}: not as many fields as the first line has columns")
            rows.append((where, dict(zip(columns, fields, strict=True))))
    return columns, rows


def _header(line: str, delimiter: str) -> list[str]:
    return [name.strip().strip('"') for name in line.removeprefix("\ufeff").strip().split(delimiter)]


def _jsonl(table: Path) -> Rows:
    rows: list[tuple[str, dict[str, Any]]] = []
    for number, line in enumerate(table.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise InputError(f'{shown(table)}, line {number}: no JSON object, such as {{"file_name": "1.png"}}')
        rows.append((f"line {number}", row))
    return list(dict.fromkeys(name for _, row in rows for name in row)) if rows else ["file_name"], rows


def _parquet(table: Path) -> Rows:
    with pq.ParquetFile(table) as file:
        read = file.read()
    return read.column_names, [(f"row {number}", row) for number, row in enumerate(read.to_pylist())]


def _picture(table: Path, where: str, row: dict[str, Any], present: list[str], caption: str | None) -> ListedPicture:
    place = f"{shown(table)}, {where}"
    name = row.get("file_name")
    if not isinstance(name, str):
        raise InputError(f"{place}: no file_name")
    fields = {column: _word(row.get(column)) for column in present}
    for column, value in fields.items():
        if not value:
            plural = "a person, or leave the column out" if column == "person" else "a class"
            raise InputError(f"{place}: {name!r}: its {column} is missing; give every picture {plural}")
    captions = None if caption is None else of_a_table(row.get(caption))
    if caption is not None and captions is None:
        raise InputError(f"{place}: {name!r}: its {caption} is neither a text nor a list of texts")
    name = _placed(table.parent, name)
    if not safe_name(name):
        raise InputError(f"{place}: file_name {name!r} leads out of the folder; it must be a path below it")
    person = fields.get("person")
    # NFC: unify one text in two encodings; any other second spelling of a person is refused
    person = None if person is None else unicodedata.normalize("NFC", person)
    return ListedPicture(name, fields.get("label"), person, captions)


def _word(value: Any) -> str:
    """A class or a person as a word without surrounding blanks; whole numbers are words too, "" is none."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return str(value).strip() if whole or isinstance(value, str) else ""


def _guesses(name: str) -> Iterator[str]:
    yield name
    yield name.strip()
    yield name.strip().replace("\\", "/")  # as Windows writes paths


def _placed(folder: Path, name: str) -> str:
    """The form of the name that exists in the folder: as written, without surrounding blanks, or with slashes."""
    for guess in _guesses(name):
        path = PurePosixPath(guess).as_posix()
        if safe_name(path) and os.path.lexists(folder / path):
            return path
    return PurePosixPath(name).as_posix()
