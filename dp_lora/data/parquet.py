"""Parquet files of pictures and labels, read in record batches: memory does not grow with rows or row groups."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from dp_lora.errors import InputError

BATCH_BYTES, BATCH_ROWS = 1 << 22, 256  # of one record batch, about; at most


@dataclass(frozen=True)
class PictureFile:
    """One Parquet file; `name` is what users know it by, errors name it."""

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
    labels: list[str]


def open_file(
    name: str, path: Path, split: str, image_column: str, label_column: str, classes: Sequence[str]
) -> PictureFile:
    """Read the file's footer. Raises InputError for a file that is not whole, a missing column, other classes."""
    try:
        with _parquet(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
            size = _bytes_of(file.metadata, image_column)
    except (OSError, pa.ArrowException) as error:
        raise InputError(_unreadable(name, path, 0, error)) from None
    columns = ", ".join(schema.names)
    if image_column not in schema.names or _bytes_field(schema.field(image_column).type) is None:
        raise InputError(f"{name}: no column {image_column!r} with pictures' bytes; it has {columns}")
    if label_column not in schema.names:
        raise InputError(f"{name}: no column {label_column!r}; it has {columns}")
    label = schema.field(label_column).type
    if not (pt.is_integer(label) or pt.is_string(label) or pt.is_large_string(label)):
        raise InputError(
            f"{name}: column {label_column!r} is of type {label}; numbers or names of classes are expected"
        )
    names = _class_names(schema, label_column)
    if names is not None and names != list(classes):
        raise InputError(f"{name}: its classes are {', '.join(names)} in this order; data.classes must be so")
    return PictureFile(name, path, split, rows, size)


def read_batches(
    file: PictureFile, image_column: str, label_column: str, classes: Sequence[str], skip: int
) -> Iterator[PictureBatch]:
    """The file's rows from row `skip` on. Raises InputError that names file and row for a row that cannot be read."""
    average = max(1, file.picture_bytes // max(1, file.rows))
    size = max(1, min(BATCH_ROWS, BATCH_BYTES // average))
    row = 0
    try:
        with _parquet(file.path) as parquet:
            columns = [image_column, label_column]
            for group in range(parquet.num_row_groups):
                end = row + parquet.metadata.row_group(group).num_rows
                if end <= skip:
                    row = end
                    continue
                for batch in parquet.iter_batches(size, row_groups=[group], columns=columns, use_threads=False):
                    row += len(batch)
                    if row > skip:
                        wanted = batch.slice(max(0, len(batch) - (row - skip)))
                        yield _batch(file, row - len(wanted), wanted, image_column, label_column, classes)
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
    """The name of the field of a picture column that holds bytes; "" where the column itself does, None without."""

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


def _batch(
    file: PictureFile, first: int, batch: pa.RecordBatch, image_column: str, label_column: str, classes: Sequence[str]
) -> PictureBatch:
    images = batch.column(image_column)
    if _bytes_field(images.type):
        # flatten, not field: it keeps the gaps of the struct itself
        images = images.flatten()[images.type.get_field_index("bytes")]
    pictures, labels = images.to_pylist(), batch.column(label_column).to_pylist()
    for row, (picture, label) in enumerate(zip(pictures, labels, strict=True), start=first):
        if picture is None:
            raise InputError(f"{file.name}, row {row}: no picture")
        known = label in classes if isinstance(label, str) else label is not None and 0 <= label < len(classes)
        if not known:
            raise InputError(f"{file.name}, row {row}: label {label!r} is none of the classes {', '.join(classes)}")
    names = [label if isinstance(label, str) else classes[label] for label in labels]
    return PictureBatch(file, first, pictures, names)
