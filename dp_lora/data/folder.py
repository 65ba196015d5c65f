"""A folder of the user's own pictures: class subfolders, or a table (metadata_table); captions as captions.py says.

Errors name the file at fault and never a number that depends on the pictures: the class list and the nominal size are
public statements of the config, and a message must not tempt anybody to read them off the data.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dp_lora.data.captions import Entry, all_or_none, read_text, text_name
from dp_lora.data.layout import Picture
from dp_lora.data.metadata_table import NAMES, Stated, find_table, read_table
from dp_lora.data.open_picture import look_at, read_picture
from dp_lora.data.png import encode_png
from dp_lora.data.refused import refused, shown
from dp_lora.data.split import split_of
from dp_lora.errors import InputError
from dp_lora.events import Events
from dp_lora.progress import progress

SOURCE = {"origin": "a folder of the operator's own pictures", "licence": "the operator's own"}
# what systems and people leave in every folder, in lower case; names that start with a dot are left out too
LITTER = frozenset(
    [
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "readme",
        "readme.txt",
        "readme.md",
        "license",
        "license.txt",
        "license.md",
    ]
)
LITTER_FOLDERS = frozenset(["__macosx", "@eadir"])
REPEATS = re.compile(r"\d{1,3}_.+")  # kohya's folder names: 10_cat trains each picture in it ten times
# no numbers on the bar: how many there are is private
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"
MANY = 5  # kinds of litter that are named


@dataclass(frozen=True)
class Listing:
    """The pictures of a folder, unopened, in an order that depends on their names alone."""

    entries: list[Entry]
    left_out: list[str]  # names of litter, each once
    captioned: int  # pictures that have captions, whether they are kept in the entries or not


def folder_pictures(folder: Path, stated: Stated, size: int, channels: int, events: Events) -> Iterator[Picture]:
    """Every picture of the folder: centre-cropped, resized to `size`, with `channels`.

    The person, or the file name where there is none, decides the split. What was left out, cropped or has captions is
    said on the terminal. Raises InputError, one line, for the first bad label, name, link or caption; these are checked
    before any picture is opened. Every picture is looked at before one is converted; where several cannot be taken, the
    terminal names each.
    """
    listing = list_pictures(folder, stated)
    _tell(listing, stated, events)
    faults, cropped = [], False
    for entry in progress(listing.entries, desc="look", bar_format=BAR):
        try:
            cropped |= look_at(folder / entry.file_name, size)
        except InputError as error:
            faults.append(str(error))
    _refuse(folder, faults, events)
    if cropped:
        events.terminal("pictures that are not square: the centre square is kept, and the rest is cut off")
    for entry in progress(listing.entries, desc="prepare", bar_format=BAR):
        try:
            image = read_picture(folder / entry.file_name, size, channels)
        except InputError as error:  # the others are read all the same: all that are broken are named at once
            faults.append(str(error))
            continue
        split = split_of(entry.person if entry.person is not None else entry.file_name)
        png = encode_png(image)
        yield Picture(_png_name(entry.file_name), entry.label, split, png, entry.person, entry.captions)
    _refuse(folder, faults, events)


def _refuse(folder: Path, faults: list[str], events: Events) -> None:
    if len(faults) == 1:
        raise refused(faults[0])
    if faults:
        for fault in faults:
            events.terminal(fault)
        raise refused(
            f"data.path={shown(folder)}: the lines above name {len(faults)} files that cannot be taken; mend them or "
            "move them away, and type the same command again"
        )


def _tell(listing: Listing, stated: Stated, events: Events) -> None:
    """What the operator may want to know of the listing, on the terminal alone: it depends on private files."""
    if listing.left_out:
        more = ", ..." if len(listing.left_out) > MANY else ""
        events.terminal(f"left out, not pictures: {', '.join(map(shown, listing.left_out[:MANY]))}{more}")
    pictures, captioned = len(listing.entries), listing.captioned
    if stated.captions:
        several = sum(len(entry.captions or ()) for entry in listing.entries)
        events.terminal(f"captions: {several}, of {pictures} pictures")
    elif captioned == pictures:
        events.terminal(f"captions: {pictures} pictures have them; kept, but this base takes classes and no captions")
    elif captioned:
        events.terminal(
            f"captions: only {captioned} of {pictures} pictures have them; not kept, and this base takes no captions"
        )


def _png_name(name: str) -> str:
    return name if name.endswith(".png") else f"{name}.png"


def list_pictures(folder: Path, stated: Stated) -> Listing:
    """The folder's pictures, unopened; captions are read."""
    if not folder.is_dir():
        raise InputError(f"data.path={shown(folder)}: no such folder")
    table = find_table(folder)
    root, left_out, in_column = folder.resolve(), set[str](), False
    if table is not None:
        entries, in_column = read_table(table, stated)
        where = f"add it to {shown(table)}, or as NAME.txt beside NAME.png"
    elif stated.by_person:
        missing = folder / NAMES[0]
        raise refused(f"{shown(missing)}: missing; privacy.unit=person needs its column person")
    else:
        entries, where = _walk(folder, stated, left_out), "write each into NAME.txt beside NAME.png"
    if not entries:
        needs = "class subfolders or a metadata.csv" if stated.classes else "pictures with captions"
        raise InputError(f"data.path={shown(folder)}: no pictures in it; it needs {needs}")
    entries.sort(key=lambda entry: entry.file_name)
    files = dict[tuple[int, int], str]()
    for entry in entries:
        _check(folder / entry.file_name, root, entry, stated, files)
    if not in_column:
        entries = [_with_text(folder, root, entry) for entry in entries]
    captioned = sum(bool(entry.captions) for entry in entries)
    return Listing(all_or_none(entries, where, wanted=stated.captions), sorted(left_out), captioned)


def _with_text(folder: Path, root: Path, entry: Entry) -> Entry:
    text = folder / text_name(entry.file_name)
    if text_name(entry.file_name) == entry.file_name or not os.path.lexists(text):
        return entry
    return Entry(entry.file_name, entry.label, entry.person, read_text(text, root))


def _check(path: Path, root: Path, entry: Entry, stated: Stated, files: dict[tuple[int, int], str]) -> None:
    try:
        entry.file_name.encode()
    except UnicodeEncodeError:
        raise refused(f"{shown(path)}: its name is not UTF-8; rename it") from None
    if stated.classes and entry.label not in stated.classes:
        raise refused(f"{shown(path)}: class {entry.label!r} is not in data.classes; move it away, or state it")
    try:
        place = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise refused(f"{shown(path)}: no such file") from None
    if not place.is_relative_to(root):
        raise refused(f"{shown(path)}: leads out of the folder; put the file itself there")
    if not place.is_file():
        raise refused(f"{shown(path)}: not a file")
    # the file itself, not its path: a hard link has another path, and a second listing the same
    stat = place.stat()
    file = (stat.st_dev, stat.st_ino)
    if file in files:
        raise refused(
            f"{shown(path)}: the same file as {files[file]!r}, linked or listed twice; a picture belongs to one unit, "
            "remove one"
        )
    files[file] = entry.file_name


def _walk(folder: Path, stated: Stated, left_out: set[str]) -> list[Entry]:
    """Pictures of class subfolders, and of folders within these; where there are no classes, of all folders.

    Adds to `left_out` the names that are no pictures in any folder.
    """

    def unreadable(error: OSError) -> None:
        raise refused(f"{shown(error.filename)}: cannot be read: {error.strerror}") from None

    entries = []
    for top, folders, files in os.walk(folder, onerror=unreadable):
        within = Path(top).relative_to(folder)
        litter = {name for name in folders if name.startswith(".") or name.lower() in LITTER_FOLDERS}
        folders[:] = sorted(set(folders) - litter)
        for name in folders:
            _check_folder(Path(top, name), stated, outermost=not within.parts)
        litter |= {name for name in files if name.startswith(".") or name.lower() in LITTER}
        pictures = {name for name in files if not name.endswith(".txt")} - litter
        texts = set(map(text_name, pictures))
        litter -= texts
        for name in sorted(set(files) - litter - texts):
            path = Path(top, name)
            if name.lower().endswith(".txt"):
                raise refused(
                    f"{shown(path)}: a caption without its picture: NAME.txt belongs to NAME.png; rename it, or move "
                    "it away"
                )
            if name.lower().endswith(".caption"):
                raise refused(f"{shown(path)}: captions are read from NAME.txt beside NAME.png; rename it")
            if stated.classes and not within.parts:
                raise refused(f"{shown(path)}: lies in no class subfolder; move it, or write a metadata.csv")
            entries.append(Entry((within / name).as_posix(), within.parts[0] if stated.classes else None, None))
        left_out |= litter
    return entries


def _check_folder(path: Path, stated: Stated, *, outermost: bool) -> None:
    if path.is_symlink():
        raise refused(f"{shown(path)}: a link to a folder; put the folder itself there")
    if not outermost or path.name in stated.classes:
        return
    if REPEATS.fullmatch(path.name):
        raise refused(
            f"{shown(path)}: named as kohya names repeats, which train a picture several times and so change the "
            f"weight of its unit of privacy; rename it to {path.name.partition('_')[2]!r}"
        )
    if stated.classes:
        raise refused(f"{shown(path)}: class {path.name!r} is not in data.classes; move it away, or state it")
