"""The one layout of every dataset, and its one reader.

    dataset.json        format, size, channels, packed, source (name, origin, licence)
    metadata.parquet    index, file_name, label, split, sha256 of the PNG bytes, person, caption (a list of one or more
                        texts); label, person and caption only where pictures have them
    images/FILE_NAME    one PNG per row; or, for small sets, images.parquet (index, image) with the PNG bytes

Rows stand in the order of their index, 0, 1, 2, ...; the index joins metadata and packed images.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dp_lora.data.persons import check_persons
from dp_lora.data.png import MODES, decode_png
from dp_lora.errors import PRIVATE_PICTURE, InputError, private_names
from dp_lora.files import read_json, whole_folder, write_json

FORMAT = 1
ROW_GROUP = 4096  # rows in memory at a time while writing
SPLITS = ("train", "test", "synthetic")
CAPTIONS = pa.list_(pa.string())
IMAGES_SCHEMA = pa.schema([("index", pa.int64()), ("image", pa.binary())])


@dataclass(frozen=True)
class Picture:
    """One picture on its way into the layout; `png` holds the bytes that will be stored."""

    file_name: str  # relative, with slashes, ends in .png
    label: str | None  # None where there are no classes
    split: str
    png: bytes
    person: str | None = None
    captions: tuple[str, ...] | None = None  # one or more


def safe_name(name: str) -> bool:
    """Whether a file of this relative name stays inside its folder."""
    parts = name.split("/")
    return not name.startswith("/") and "\0" not in name and all(part not in ("", ".", "..") for part in parts)


def write_dataset(
    folder: Path,
    pictures: Iterable[Picture],
    source: dict[str, Any],
    size: int,
    channels: int,
    packed: bool,
    check: Callable[[Path], None] | None = None,
    *,
    private: bool = False,
) -> None:
    """Write a dataset, whole or not at all, as `fill_dataset`; replaces an older dataset of that name.

    `check` may refuse the finished folder before it takes its place. Only its owner may read a `private` dataset.
    """
    with whole_folder(folder, private=private) as temporary:
        fill_dataset(temporary, pictures, source, size, channels, packed)
        if check is not None:
            check(temporary)


def fill_dataset(
    folder: Path, pictures: Iterable[Picture], source: dict[str, Any], size: int, channels: int, packed: bool
) -> None:
    """Fill an empty folder with a dataset; the caller completes or removes the folder.

    `pictures` is read once; all have a label, or none has; likewise a person, and captions. `source` describes the
    origin in dataset.json: it must not depend on private pictures. Equal pictures in equal order give equal bytes. In
    memory at a time: one picture (ROW_GROUP pictures if `packed`), and every file name and person. Raises InputError
    for an unsafe or repeated file name, an unknown split, a label, person or caption missing beside others, a person
    spelled in two ways, and for no pictures at all.
    """
    rows = iter(pictures)
    first = next(rows, None)
    if first is None:
        raise InputError("dataset: no pictures to write")
    has = _optional(first)
    schema = _metadata_schema(**has)
    metadata = _Table(folder / "metadata.parquet", schema)
    images = _Table(folder / "images.parquet", IMAGES_SCHEMA) if packed else None
    seen: dict[str, str | None] = {}  # the person of each file name
    try:
        for index, picture in enumerate(chain([first], rows)):
            _check(picture, has, seen)
            digest = hashlib.sha256(picture.png).hexdigest()
            row = {**vars(picture), "index": index, "sha256": digest, "caption": picture.captions}
            metadata.append([row[name] for name in schema.names])
            if images is not None:
                images.append([index, picture.png])
            else:
                _write_file(folder / "images", picture)
    finally:
        metadata.close()
        if images is not None:
            images.close()
    check_persons(((repr(name), person) for name, person in seen.items() if person is not None), "dataset")
    _write_facts(folder, source, size, channels, packed)


def write_index(
    folder: Path,
    rows: Iterable[Sequence[Any]],
    source: dict[str, Any],
    size: int,
    channels: int,
    *,
    label: bool = True,
    caption: bool = False,
) -> None:
    """Turn a folder with a filled images/ into a dataset.

    `rows`: for each picture, in the order of the index, file_name, label (with `label`), split, sha256, and the list of
    captions (with `caption`); read once, ROW_GROUP of them in memory.
    """
    metadata = _Table(folder / "metadata.parquet", _metadata_schema(label=label, person=False, caption=caption))
    try:
        for index, row in enumerate(rows):
            metadata.append([index, *row])
    finally:
        metadata.close()
    _write_facts(folder, source, size, channels, packed=False)


def _write_facts(folder: Path, source: dict[str, Any], size: int, channels: int, packed: bool) -> None:
    facts = {"format": FORMAT, "size": size, "channels": channels, "packed": packed, "source": source}
    write_json(folder / "dataset.json", facts)


def _optional(picture: Picture) -> dict[str, bool]:
    """Each optional column, and whether this picture has it."""
    return {
        "label": picture.label is not None,
        "person": picture.person is not None,
        "caption": picture.captions is not None,
    }


def _metadata_schema(*, label: bool, person: bool, caption: bool) -> pa.Schema:
    names = ["file_name", *(["label"] if label else []), "split", "sha256", *(["person"] if person else [])]
    captions = [("caption", CAPTIONS)] if caption else []
    return pa.schema([("index", pa.int64()), *((name, pa.string()) for name in names), *captions])


class _Table:
    """A parquet file that is written row by row, ROW_GROUP of them in memory."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(path, schema, compression="zstd", store_schema=False)
        self._schema = schema
        self._rows: list[list[Any]] = []

    def append(self, row: list[Any]) -> None:
        self._rows.append(row)
        if len(self._rows) == ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        columns = [list(column) for column in zip(*self._rows, strict=True)]
        self._writer.write_table(pa.table(columns, schema=self._schema))
        self._rows = []

    def close(self) -> None:
        if self._rows:
            self._flush()
        self._writer.close()


@private_names(PRIVATE_PICTURE)
def _check(picture: Picture, has: dict[str, bool], seen: dict[str, str | None]) -> None:
    name = picture.file_name
    if not safe_name(name) or not name.endswith(".png"):
        raise InputError(f"{name!r}: not a relative file name that ends in .png; rename the picture")
    if name in seen:
        raise InputError(f"{name!r}: two pictures of this name; rename one")
    seen[name] = picture.person
    if picture.split not in SPLITS:
        raise InputError(f"{name!r}: split {picture.split!r} must be one of {', '.join(SPLITS)}")
    for column, found in _optional(picture).items():
        if found != has[column]:
            raise InputError(f"{name!r}: give every picture a {column}, or none")
    if picture.captions is not None and not (picture.captions and all(map(str.strip, picture.captions))):
        raise InputError(f"{name!r}: its caption is empty; write one")


def _write_file(folder: Path, picture: Picture) -> None:
    path = folder / picture.file_name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture.png)
    except OSError as error:
        cause = f"cannot be written: {error.strerror}"
        raise InputError(f"{picture.file_name!r}: {cause}", public=f"a picture {cause}") from None


class Dataset:
    """The pictures of one split, decoded when they are asked for.

    `labels` int64 (n,): positions in the classes given to `read_dataset`, all 0 where there are none; `index` int64
    (n,): row in metadata.parquet; `file_names` list of n; `persons` list of n, and `captions` tuple of n with one or
    more texts each, or None where pictures have none; `size` pixels, square; `channels`.
    """

    def __init__(self, folder: Path, rows: pa.Table, classes: Sequence[str], facts: dict[str, Any]) -> None:
        self.folder = folder
        self.classes = list(classes)
        self.size, self.channels = int(facts["size"]), int(facts["channels"])
        self.source: dict[str, Any] = facts["source"]
        self.index: np.ndarray = rows["index"].to_numpy().astype(np.int64)
        self.file_names: list[str] = rows["file_name"].to_pylist()
        self.labels = self._positions(rows["label"].to_pylist()) if classes else np.zeros(len(rows), np.int64)
        self.persons: list[str] | None = rows["person"].to_pylist() if "person" in rows.column_names else None
        self._captions = rows["caption"] if "caption" in rows.column_names else None
        self._sha256: list[str] = rows["sha256"].to_pylist()
        self._packed = _read_table(folder / "images.parquet", IMAGES_SCHEMA) if facts["packed"] else None

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def captions(self) -> tuple[tuple[str, ...], ...] | None:
        """Each picture's captions, one or more, private as the picture is; None where the dataset has none."""
        return None if self._captions is None else tuple(tuple(texts) for texts in self._captions.to_pylist())

    def require_shape(self, size: int, channels: int, section: str) -> None:
        """Raise InputError where the pictures have another shape than the config's `section` (public, data) says."""
        if (self.size, self.channels) != (size, channels):
            raise InputError(
                f"{self.folder}: pictures of {self.size} pixels and {self.channels} channels, but "
                f"{section}.size={size} and {section}.channels={channels}; prepare them anew, or set both so"
            )

    @private_names(PRIVATE_PICTURE)
    def images(self, rows: Sequence[int] | np.ndarray | slice) -> np.ndarray:
        """The pictures of these rows of the split, in this order; uint8 (n, size, size, channels).

        Raises InputError that names the file when a picture is missing, or differs from the written one.
        """
        wanted = np.arange(len(self))[rows]
        images = np.empty((len(wanted), self.size, self.size, self.channels), np.uint8)
        for place, row in enumerate(wanted):
            images[place] = self._image(int(row))
        return images

    def digest(self) -> str:
        """SHA-256 over this split's rows of the metadata, and so over every picture and caption; 64 hex digits."""
        total = hashlib.sha256(json.dumps([FORMAT, self.size, self.channels]).encode())
        persons: Sequence[str | None] = self.persons if self.persons is not None else [None] * len(self)
        labels = (self.classes[label] if self.classes else None for label in self.labels)
        captions: Sequence[tuple] = [()] * len(self) if self.captions is None else [(texts,) for texts in self.captions]
        rows = zip(self.index.tolist(), self.file_names, labels, self._sha256, persons, strict=True)
        for row, texts in zip(rows, captions, strict=True):
            total.update(json.dumps([*row, *texts]).encode() + b"\n")
        return total.hexdigest()

    @private_names(PRIVATE_PICTURE)
    def _positions(self, labels: list[str]) -> np.ndarray:
        position = {name: place for place, name in enumerate(self.classes)}
        for label, file_name in zip(labels, self.file_names, strict=True):
            if label not in position:
                raise InputError(f"{self.folder}: {file_name!r} is of class {label!r}, which is not in the class list")
        return np.array([position[label] for label in labels], np.int64)

    def _image(self, row: int) -> np.ndarray:
        name = self.file_names[row]
        try:
            png = self._png(row, name)
            if hashlib.sha256(png).hexdigest() != self._sha256[row]:
                raise ValueError("its bytes are not the ones that were written (sha256 differs)")
            return decode_png(png, self.size, self.channels)
        except (OSError, ValueError, IndexError) as error:
            where = self.folder / ("images" if self._packed is None else "images.parquet")
            raise InputError(f"{where}: {name!r} cannot be read: {error}; prepare the dataset again") from None

    def _png(self, row: int, name: str) -> bytes:
        if self._packed is not None:
            return self._packed["image"][int(self.index[row])].as_py()
        if not safe_name(name):
            raise ValueError("its name leaves the folder")
        return (self.folder / "images" / name).read_bytes()


def read_dataset(folder: Path, classes: Sequence[str], split: str) -> Dataset:
    """Open one split of a dataset; labels become positions in `classes`, which may be empty.

    Raises InputError, one line that names the file, where the folder is no dataset, a label is not in `classes`, or the
    split is empty. Packed pictures are held in memory as PNG bytes, others stay on disk.
    """
    folder = Path(folder)
    facts = _read_facts(folder)
    path = folder / "metadata.parquet"
    table = _read_table(path, _metadata_schema(label=bool(classes), person=False, caption=False))
    if not classes and "label" in table.column_names:
        raise InputError(f"{path}: has classes, and the config lists none; prepare it again")
    if "caption" in table.column_names and not _holds_captions(table["caption"]):
        raise InputError(f"{path}: column 'caption' is no lists of texts without gaps; prepare it again")
    if "person" in table.column_names and (table["person"].type != pa.string() or table["person"].null_count):
        raise InputError(f"{path}: column 'person' is no text without gaps; prepare it again")
    rows = table.filter(pc.equal(table["split"], split))
    if len(rows) == 0:
        raise InputError(f"{folder}: no pictures in split {split!r}")
    return Dataset(folder, rows, classes, facts)


def has_split(folder: Path, split: str) -> bool:
    """Whether a dataset has pictures in a split."""
    table = _read_table(Path(folder) / "metadata.parquet", _metadata_schema(label=False, person=False, caption=False))
    return split in table["split"].unique().to_pylist()


def _holds_captions(column: pa.ChunkedArray) -> bool:
    if column.type != CAPTIONS or column.null_count or pc.list_flatten(column).null_count:
        return False
    return pc.min(pc.list_value_length(column)).as_py() != 0


def _read_facts(folder: Path) -> dict[str, Any]:
    path = folder / "dataset.json"
    try:
        facts = read_json(path)
        known = isinstance(facts, dict) and facts.get("format") == FORMAT
        known = known and {"packed", "source"} <= facts.keys()
        known = known and facts.get("channels") in MODES and isinstance(facts.get("size"), int)
    except FileNotFoundError:
        raise InputError(f"{path}: missing; make the dataset with the entry point prepare") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not known:
        raise InputError(f"{path}: not a dataset of format {FORMAT}; prepare it again")
    return facts


def _read_table(path: Path, schema: pa.Schema) -> pa.Table:
    try:
        # not read_table: it reads a parent folder called key=value as a column
        with pq.ParquetFile(path) as file:
            table = file.read()
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())}; prepare it again") from None
    for field in schema:
        known = field.name in table.column_names and table.schema.field(field.name).type == field.type
        if not known or table[field.name].null_count:
            raise InputError(f"{path}: no column {field.name!r} of type {field.type} without gaps; prepare it again")
    # the index joins the two tables by position
    if not np.array_equal(table["index"].to_numpy(), np.arange(len(table))):
        raise InputError(f"{path}: index must run 0, 1, 2, ...; prepare the dataset again")
    return table
