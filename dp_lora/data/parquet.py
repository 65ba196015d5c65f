"""Parquet files of pictures, labels, captions, read in record batches: memory does not grow with rows or row groups."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from dp_lora.data.captions import of_a_table
from dp_lora.errors import InputError

BATCH_BYTES, BATCH_ROWS = 1 << 22, 256  # about so many bytes, at most so many rows, in one record batch


@dataclass(frozen=True)
class Wanted:
    """How to read the files, and what their pictures must be."""

    image_column: str
    label_column: str
    classes: tuple[str, ...]  # may be empty with captions: then no label is read
    size: int
    channels: int
    caption_column: str | None = None

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        captions = [self.caption_column] if self.caption_column is not None else []
        return [self.image_column, *([self.label_column] if self.classes else []), *captions]


@dataclass(frozen=True)
class PictureFile:
    """One Parquet file; `name` is the name that users know and errors show."""

    name: str
    path: Path
    split: str
    rows: int
    picture_bytes: int  # of all its pictures


@dataclass(frozen=True)
class PictureBatch:
    """Rows of one file in its order, from `first`; `pictures` are files' bytes, of any format."""

    file: PictureFile
    first: int
    pictures: list[bytes]
    labels: list[str | None]
    captions: list[tuple[str, ...] | None]


def open_file(name: str, path: Path, split: str, wanted: Wanted) -> PictureFile:
    """Read the file's footer. Raises InputError for a file that is not whole, a missing column, other classes."""
    image_column, label_column = wanted.image_column, wanted.label_column
    try:
        with _parquet(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
            size = _bytes_of(file.metadata, image_column)
    except (OSError, pa.ArrowException) as error:
        raise InputError(_unreadable(name, path, 0, error)) from None
    columns = ", ".join(schema.names)
    if image_column not in schema.names or _bytes_field(schema.field(image_column).type) is None:
        raise InputError(f"{name}: no column {image_column!r} with pictures' bytes; it has {columns}")
    for column in wanted.columns[1:]:
        if column not in schema.names:
            raise InputError(f"{name}: no column {column!r}; it has {columns}")
    if wanted.classes:
        label = schema.field(label_column).type
        if not (pt.is_integer(label) or _is_text(label)):
            raise InputError(
                f"{name}: column {label_column!r} is of type {label}; numbers or names of classes are expected"
            )
        names = _class_names(schema, label_column)
        if names is not None and names != list(wanted.classes):
            raise InputError(f"{name}: its classes are {', '.join(names)} in this order; data.classes must be so")
    if wanted.caption_column is not None:
        kind = schema.field(wanted.caption_column).type
        several = pt.is_list(kind) or pt.is_large_list(kind)
        if not _is_text(kind.value_type if several else kind):
            raise InputError(
                f"{name}: column {wanted.caption_column!r} is of type {kind}; texts, or lists of texts, are expected"
            )
    return PictureFile(name, path, split, rows, size)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pt.is_string(kind) or pt.is_large_string(kind))


def read_batches(file: PictureFile, wanted: Wanted, skip: int) -> Iterator[PictureBatch]:
    """The file's rows from row `skip` on. Raises InputError that names file and row for a row that cannot be read."""
    average = max(1, file.picture_bytes // max(1, file.rows))
    size = max(1, min(BATCH_ROWS, BATCH_BYTES // average))
    row = 0
    try:
        with _parquet(file.path) as parquet:
            for group in range(parquet.num_row_groups):
                end = row + parquet.metadata.row_group(group).num_rows
                if end <= skip:
                    row = end
                    continue
                for batch in parquet.iter_batches(size, row_groups=[group], columns=wanted.columns, use_threads=False):
                    row += len(batch)
                    if row > skip:
                        rest = batch.slice(max(0, len(batch) - (row - skip)))
                        yield _batch(file, row - len(rest), rest, wanted)
    except (OSError, pa.ArrowException) as error:
        raise InputError(_unreadable(file.name, file.path, row, error)) from None


def _parquet(path: Path) -> pq.ParquetFile:
    # buffered, not read ahead: a row group may be as large as the file
    return pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)


def _unreadable(name: str, path: Path, row: int, error: Exception) -> str:
    cause = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (
        f"{name}: row {row} or after cannot be read: {cause.rstrip('.')}; if the source is whole, remove "
        f"{path.resolve()} and call again"
    )


def _bytes_field(kind: pa.DataType) -> str | None:
    """The field of a picture column that holds bytes: its name, "" for the column itself, None without bytes."""

    def is_bytes(of: pa.DataType) -> bool:
        return bool(pt.is_binary(of) or pt.is_large_binary(of))

    if is_bytes(kind):
        return ""
    if pt.is_struct(kind) and any(field.name == "bytes" and is_bytes(field.type) for field in kind):
        return "bytes"
    return None


def _bytes_of(metadata: pq.FileMetaData, column: str) -> int:
    total = 0
    for group in range(metadata.num_row_groups):
        chunks = [metadata.row_group(group).column(place) for place in range(metadata.row_group(group).num_columns)]
        total += sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] == column)
    return total


def _class_names(schema: pa.Schema, label_column: str) -> list[str] | None:
    """The classes as the library datasets writes them into a file's metadata; None where it has none."""
    try:
        facts = json.loads((schema.metadata or {})[b"huggingface"])
        names = facts["info"]["features"][label_column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names]


def _batch(file: PictureFile, first: int, batch: pa.RecordBatch, wanted: Wanted) -> PictureBatch:
    images = batch.column(wanted.image_column)
    if _bytes_field(images.type):
        # flatten, not field: flatten keeps the struct's own nulls
        images = images.flatten()[images.type.get_field_index("bytes")]
    pictures = images.to_pylist()
    for row, picture in enumerate(pictures, start=first):
        if picture is None:
            raise InputError(f"{file.name}, row {row}: no picture")
    return PictureBatch(
        file, first, pictures, _labels(file, first, batch, wanted), _captions(file, first, batch, wanted)
    )


def _labels(file: PictureFile, first: int, batch: pa.RecordBatch, wanted: Wanted) -> list[str | None]:
    classes = wanted.classes
    if not classes:
        return [None] * len(batch)
    labels = batch.column(wanted.label_column).to_pylist()
    for row, label in enumerate(labels, start=first):
        known = label in classes if isinstance(label, str) else label is not None and 0 <= label < len(classes)
        if not known:
            raise InputError(f"{file.name}, row {row}: label {label!r} is none of the classes {', '.join(classes)}")
    return [label if isinstance(label, str) else classes[label] for label in labels]


def _captions(file: PictureFile, first: int, batch: pa.RecordBatch, wanted: Wanted) -> list[tuple[str, ...] | None]:
    if wanted.caption_column is None:
        return [None] * len(batch)
    captions: list[tuple[str, ...] | None] = []
    for row, value in enumerate(batch.column(wanted.caption_column).to_pylist(), start=first):
        texts = of_a_table(value)
        if not texts:
            raise InputError(f"{file.name}, row {row}: no caption in column {wanted.caption_column!r}")
        captions.append(texts)
    return captions
