"""A folder of the user's own pictures: class subfolders, or a table (metadata_table); captions as captions.py says.

Errors name the file at fault and never a number that depends on the pictures: the class list and the nominal size are
public statements of the config, and a message must not tempt anybody to read them off the data.
"""

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dp_lora.data.captions import ListedPicture, all_or_none, lies_in, read_text, text_name
from dp_lora.data.faults import Faults
from dp_lora.data.layout import Picture
from dp_lora.data.metadata_table import NAMES, Stated, find_table, read_table
from dp_lora.data.open_picture import look_at, read_picture
from dp_lora.data.png import encode_png
from dp_lora.data.split import split_of
from dp_lora.errors import PRIVATE_PICTURE, InputError, private_names, shown
from dp_lora.events import Events
from dp_lora.progress import progress

SOURCE = {"origin": "a folder of the operator's own pictures", "licence": "the operator's own"}
# files that systems and people leave in every folder, in lower case; names with a leading dot are left out too
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
# no numbers on the bar: the number of pictures is private
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"
LONG = 1.0  # seconds: a quicker look shows no bar
MANY = 5  # most kinds of litter that a message names


@dataclass(frozen=True)
class Listing:
    """The pictures of a folder, unopened, in an order that depends on their names alone."""

    pictures: list[ListedPicture]
    left_out: list[str]  # names of litter, each once
    captioned: int  # pictures that have captions, whether `pictures` keeps them or not


def folder_pictures(folder: Path, stated: Stated, size: int, channels: int, events: Events) -> Iterator[Picture]:
    """Every picture of the folder: centre-cropped, resized to `size`, with `channels`.

    The person, or the file name where there is none, decides the split. The terminal says what was left out, whether
    pictures are cropped, and how many captions there are. Raises InputError, one line, for bad labels, names, links and
    captions; these are checked before any picture is opened. Every picture is looked at before one is converted. Where
    several files cannot be taken, the terminal names each.
    """
    listing = list_pictures(folder, stated, events)
    _tell(listing, stated, events)
    if look_over(folder, listing, size, events):
        events.terminal("pictures that are not square: the centre square is kept, and the rest is cut off")
    faults = Faults()
    for picture in progress(listing.pictures, desc="prepare", bar_format=BAR):
        try:
            image = read_picture(folder / picture.file_name, size, channels)
        except InputError as error:  # read the others too, to name all broken ones at once
            faults.lines.append(str(error))
            continue
        split = split_of(picture.person if picture.person is not None else picture.file_name)
        png = encode_png(image)
        yield Picture(_png_name(picture.file_name), picture.label, split, png, picture.person, picture.captions)
    faults.refuse(folder, events)


def look_over(folder: Path, listing: Listing, size: int, events: Events) -> bool:
    """Look at the header of every picture; whether one of them is not square.

    Raises InputError where a picture cannot be taken; of several the terminal names each.
    """
    faults, cropped = Faults(), False
    for picture in progress(listing.pictures, desc="look", bar_format=BAR, delay=LONG):
        with faults.noted():
            cropped |= look_at(folder / picture.file_name, size)
    faults.refuse(folder, events)
    return cropped


def _tell(listing: Listing, stated: Stated, events: Events) -> None:
    """Tell the operator about the listing, on the terminal alone: it depends on private files."""
    if listing.left_out:
        more = ", ..." if len(listing.left_out) > MANY else ""
        events.terminal(f"left out, not pictures: {', '.join(map(shown, listing.left_out[:MANY]))}{more}")
    pictures, captioned = len(listing.pictures), listing.captioned
    if stated.captions:
        several = sum(len(picture.captions or ()) for picture in listing.pictures)
        events.terminal(f"captions: {several}, of {pictures} pictures")
    elif captioned == pictures:
        events.terminal(f"captions: {pictures} pictures have them; kept, but not trained on: data.captions=false")
    elif captioned:
        events.terminal(f"captions: only {captioned} of {pictures} pictures have them; not kept: data.captions=false")


def _png_name(name: str) -> str:
    return name if name.endswith(".png") else f"{name}.png"


@private_names(PRIVATE_PICTURE)
def list_pictures(folder: Path, stated: Stated, events: Events | None = None) -> Listing:
    """The folder's pictures, unopened; captions are read. Raises InputError; the terminal shows several faults."""
    if not folder.is_dir():
        raise InputError(f"data.path={shown(folder)}: no such folder")
    table = find_table(folder)
    root, left_out, in_column, faults = str(folder.resolve()), set[str](), False, Faults()
    if table is not None:
        listed, in_column = read_table(table, stated, faults)
        where = f"add it to {shown(table)}, or as NAME.txt beside NAME.png"
    elif stated.by_person:
        missing = folder / NAMES[0]
        raise InputError(f"{shown(missing)}: missing; privacy.unit=person needs its column person")
    else:
        listed, where = _walk(folder, stated, left_out, faults), "write each into NAME.txt beside NAME.png"
    if not listed and not faults.lines:
        needs = "class subfolders or a metadata.csv" if stated.classes else "pictures"
        raise InputError(f"data.path={shown(folder)}: no pictures in it; it needs {needs}")
    check, pictures = _Check(folder, root, stated), list[ListedPicture]()
    for picture in sorted(listed, key=lambda picture: picture.file_name):
        with faults.noted():
            check(picture)
            pictures.append(picture if in_column else _with_text(str(folder), root, picture))
    # before captions are missed: one may be missing because its file is at fault
    faults.refuse(folder, events or Events())
    captioned = sum(bool(picture.captions) for picture in pictures)
    return Listing(all_or_none(pictures, where, wanted=stated.captions), sorted(left_out), captioned)


def _with_text(folder: str, root: str, picture: ListedPicture) -> ListedPicture:
    name = text_name(picture.file_name)
    captions = read_text(f"{folder}/{name}", root) if name != picture.file_name else ()
    return ListedPicture(picture.file_name, picture.label, picture.person, captions) if captions else picture


class _Check:
    """Checks each listed file, once per picture, with few system calls: there may be tens of thousands of files."""

    def __init__(self, folder: Path, root: str, stated: Stated) -> None:
        self._folder, self._root, self._stated = str(folder), root, stated
        self._files: dict[tuple[int, int], str] = {}  # name of the picture by device and inode
        self._inside: dict[str, bool] = {}  # whether a folder, which may be a link, lies in the root

    def __call__(self, picture: ListedPicture) -> None:
        """Raise InputError for a bad name, label or link, and for a second listing."""
        path = f"{self._folder}/{picture.file_name}"
        try:
            picture.file_name.encode()
        except UnicodeEncodeError:
            raise InputError(f"{shown(path)}: its name is not UTF-8; rename it") from None
        if self._stated.classes and picture.label not in self._stated.classes:
            raise InputError(
                f"{shown(path)}: class {picture.label!r} is not in data.classes; move it away, or state it"
            )
        try:
            status, inside = self._look(path)
        except OSError:
            raise InputError(f"{shown(path)}: no such file") from None
        if not inside:
            raise InputError(f"{shown(path)}: leads out of the folder; put the file itself there")
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{shown(path)}: not a file")
        # by device and inode: this finds a hard link, whose path differs, and a second listing of the same path
        file = (status.st_dev, status.st_ino)
        if file in self._files:
            raise InputError(
                f"{shown(path)}: the same file as {self._files[file]!r}, linked or listed twice; a picture belongs to "
                "one unit, remove one"
            )
        self._files[file] = picture.file_name

    def _look(self, path: str) -> tuple[os.stat_result, bool]:
        """The file that a path leads to, and whether that lies in the root."""
        status, top = os.lstat(path), os.path.dirname(path)
        if stat.S_ISLNK(status.st_mode):
            return os.stat(path), lies_in(path, self._root)
        if top not in self._inside:
            self._inside[top] = lies_in(top, self._root)
        return status, self._inside[top]


def _walk(folder: Path, stated: Stated, left_out: set[str], faults: Faults) -> list[ListedPicture]:
    """Pictures of class subfolders, at any depth; without classes, of all folders.

    Adds the names of litter to `left_out`; a folder at fault is not entered.
    """

    def unreadable(error: OSError) -> None:
        raise InputError(f"{shown(error.filename)}: cannot be read: {error.strerror}") from None

    listed = []
    for top, folders, files in os.walk(folder, onerror=unreadable):
        within = Path(top).relative_to(folder)
        prefix = f"{within.as_posix()}/" if within.parts else ""
        litter = {name for name in folders if name.startswith(".") or name.lower() in LITTER_FOLDERS}
        entered = []
        for name in sorted(set(folders) - litter):
            with faults.noted():
                _check_folder(Path(top, name), stated, outermost=not within.parts)
                entered.append(name)
        folders[:] = entered
        litter |= {name for name in files if name.startswith(".") or name.lower() in LITTER}
        pictures = {name for name in files if not name.endswith(".txt")} - litter
        texts = set(map(text_name, pictures))
        litter -= texts
        for name in sorted(set(files) - litter - texts):
            with faults.noted():
                _check_name(f"{top}/{name}", in_a_class=bool(within.parts) or not stated.classes)
                listed.append(ListedPicture(f"{prefix}{name}", within.parts[0] if stated.classes else None, None))
        left_out |= litter
    return listed


def _check_name(path: str, *, in_a_class: bool) -> None:
    if path.lower().endswith(".txt"):
        raise InputError(
            f"{shown(path)}: a caption without its picture: NAME.txt belongs to NAME.png; rename it, or move it away"
        )
    if path.lower().endswith(".caption"):
        raise InputError(f"{shown(path)}: captions are read from NAME.txt beside NAME.png; rename it")
    if not in_a_class:
        raise InputError(f"{shown(path)}: lies in no class subfolder; move it, or write a metadata.csv")


def _check_folder(path: Path, stated: Stated, *, outermost: bool) -> None:
    if path.is_symlink():
        raise InputError(f"{shown(path)}: a link to a folder; put the folder itself there")
    if not outermost or path.name in stated.classes:
        return
    if REPEATS.fullmatch(path.name):
        raise InputError(
            f"{shown(path)}: named as kohya names repeats, which train a picture several times and so change the "
            f"weight of its unit of privacy; rename it to {path.name.partition('_')[2]!r}"
        )
    if stated.classes:
        raise InputError(f"{shown(path)}: class {path.name!r} is not in data.classes; move it away, or state it")
