"""A folder of the user's own pictures: class subfolders, or a metadata.csv (file_name, label, optional person).

Errors name the file at fault and never a number that depends on the pictures: the class list and the nominal size are
public statements of the config, and a message must not tempt anybody to read them off the data.
"""

import csv
import os
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps

from dp_lora.data.layout import Picture, safe_name
from dp_lora.data.persons import check_persons
from dp_lora.data.png import FORMATS, converted, encode_png
from dp_lora.data.split import split_of
from dp_lora.errors import PRIVATE_PICTURE, InputError, private_names
from dp_lora.progress import progress

MAX_PIXELS = 2**26  # of a picture before it is cropped; more is taken for a decompression bomb
SOURCE = {"origin": "a folder of the operator's own pictures", "licence": "the operator's own"}


@dataclass(frozen=True)
class ListedPicture:
    """One picture of the folder, not yet opened; `file_name` is relative to the folder, with slashes."""

    file_name: str
    label: str
    person: str | None


def folder_pictures(
    folder: Path, classes: Sequence[str], size: int, channels: int, person_required: bool
) -> Iterator[Picture]:
    """Every picture of the folder: centre-cropped, resized to `size`, with `channels`.

    The person, or the file name where there is none, decides the split. Raises InputError, one line, for the first bad
    label, name, link or file; labels and names are checked before any picture is opened.
    """
    pictures = list_pictures(folder, classes, person_required)
    # no numbers on the bar: the number of pictures is private
    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"
    for picture in progress(pictures, desc="prepare", bar_format=form):
        image = read_picture(folder / picture.file_name, size, channels)
        identifier = picture.person if picture.person is not None else picture.file_name
        yield Picture(
            _png_name(picture.file_name), picture.label, split_of(identifier), encode_png(image), picture.person
        )


def _png_name(name: str) -> str:
    return name if name.endswith(".png") else f"{name}.png"


def shown(path: object) -> str:
    """A path in the form of a one-line message."""
    text = str(path)
    return text if text.isprintable() else repr(text)


@private_names(PRIVATE_PICTURE)
def list_pictures(folder: Path, classes: Sequence[str], person_required: bool) -> list[ListedPicture]:
    """The folder's pictures, unopened, in an order that depends on their names alone."""
    if not folder.is_dir():
        raise InputError(f"data.path={shown(folder)}: no such folder")
    table = folder / "metadata.csv"
    if table.exists():
        pictures = _read_table(table, person_required)
    elif person_required:
        raise InputError(f"{shown(table)}: missing; privacy.unit=person needs its column person")
    else:
        pictures = _walk(folder, classes)
    if not pictures:
        raise InputError(f"data.path={shown(folder)}: no pictures in it; it needs class subfolders or a metadata.csv")
    pictures.sort(key=lambda picture: picture.file_name)
    root, files = folder.resolve(), dict[tuple[int, int], str]()
    for picture in pictures:
        _check(folder / picture.file_name, root, picture, classes, files)
    return pictures


def _check(
    path: Path, root: Path, picture: ListedPicture, classes: Sequence[str], files: dict[tuple[int, int], str]
) -> None:
    try:
        picture.file_name.encode()
    except UnicodeEncodeError:
        raise InputError(f"{shown(path)}: its name is not UTF-8; rename it") from None
    if picture.label not in classes:
        raise InputError(f"{shown(path)}: class {picture.label!r} is not in data.classes; move it away, or state it")
    try:
        place = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise InputError(f"{shown(path)}: no such file") from None
    if not place.is_relative_to(root):
        raise InputError(f"{shown(path)}: leads out of the folder; put the file itself there")
    if not place.is_file():
        raise InputError(f"{shown(path)}: not a file")
    # the file itself, not its path: a hard link has another path, and a second listing the same
    stat = place.stat()
    file = (stat.st_dev, stat.st_ino)
    if file in files:
        raise InputError(
            f"{shown(path)}: the same file as {files[file]!r}, linked or listed twice; a picture belongs to one unit, "
            "remove one"
        )
    files[file] = picture.file_name


def _walk(folder: Path, classes: Sequence[str]) -> list[ListedPicture]:
    """Pictures of class subfolders, and of folders within these; names that start with a dot are left out."""

    def unreadable(error: OSError) -> None:
        raise InputError(f"{shown(error.filename)}: cannot be read: {error.strerror}") from None

    pictures = []
    for top, folders, files in os.walk(folder, onerror=unreadable):
        within = Path(top).relative_to(folder)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            path = Path(top, name)
            if path.is_symlink():
                raise InputError(f"{shown(path)}: a link to a folder; put the folder itself there")
            if not within.parts and name not in classes:
                raise InputError(f"{shown(path)}: class {name!r} is not in data.classes; move it away, or state it")
        for name in sorted(files):
            if name.startswith("."):
                continue
            if not within.parts:
                path = Path(top, name)
                raise InputError(f"{shown(path)}: lies in no class subfolder; move it, or write a metadata.csv")
            pictures.append(ListedPicture((within / name).as_posix(), within.parts[0], None))
    return pictures


def _read_table(table: Path, person_required: bool) -> list[ListedPicture]:
    try:
        # utf-8-sig: spreadsheets write a byte order mark
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = reader.fieldnames or []
            for column in ("file_name", "label", *(["person"] if person_required else [])):
                if column not in columns:
                    unit = " (privacy.unit=person)" if column == "person" else ""
                    raise InputError(f"{shown(table)}: no column {column!r}{unit}; its first line must name it")
            rows = [(reader.line_num, _entry(table, reader.line_num, row)) for row in reader]
    except UnicodeDecodeError:
        raise InputError(f"{shown(table)}: not UTF-8; save it as UTF-8") from None
    except (OSError, csv.Error) as error:
        raise InputError(f"{shown(table)}: cannot be read: {' '.join(str(error).split())}") from None
    named = ((f"line {line}", picture.person) for line, picture in rows if picture.person is not None)
    check_persons(named, shown(table))
    return [picture for _, picture in rows]


def _entry(table: Path, line: int, row: dict[str | None, str | None]) -> ListedPicture:
    where = f"{shown(table)}, line {line}"
    name, label, person = row["file_name"], row["label"], row.get("person", "")
    if name is None or label is None or person is None or None in row:
        raise InputError(f"{where}: not as many fields as the first line has columns")
    if "person" in row and not person.strip():
        raise InputError(f"{where}: {name!r}: its person is missing; name one for every picture")
    name = PurePosixPath(name).as_posix()
    if not safe_name(name):
        raise InputError(f"{where}: file_name {name!r} leads out of the folder; it must be a path below it")
    # one name in two encodings is one person; every other second spelling is refused
    return ListedPicture(name, label, unicodedata.normalize("NFC", person.strip()) if "person" in row else None)


@private_names(PRIVATE_PICTURE)
def read_picture(path: Path, size: int, channels: int) -> np.ndarray:
    """Decode one file, crop its centre square, resize; uint8 (size, size, channels).

    Turned upright by its EXIF orientation; transparency becomes white; 16-bit greys are scaled to 8 bits. Raises
    InputError that names the file.
    """
    try:
        if path.stat().st_size == 0:
            raise ValueError("the file is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata: one line says what is wrong, or none
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"more than {MAX_PIXELS} pixels; make it smaller")
                # a camera's MPO holds a preview beside the one picture that it shows
                if getattr(image, "is_animated", False) and image.format != "MPO":
                    raise ValueError("an animation; save one frame of it")
                return _square(ImageOps.exif_transpose(image), size, channels)
    except Image.UnidentifiedImageError:
        raise InputError(f"{shown(path)}: not a picture of a known format ({', '.join(FORMATS)})") from None
    # decoders raise almost any exception for broken files
    except Exception as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{shown(path)}: not a readable picture: {cause}") from None


def _square(image: Image.Image, size: int, channels: int) -> np.ndarray:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    image = converted(image, channels).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image, np.uint8).reshape(size, size, channels)
