"""Captions of the user's own pictures: `picture.txt` beside `picture.png`, or a column of the table.

A caption is as private as its picture: no message contains its text.
"""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dp_lora.config.schema import Config
from dp_lora.data.layout import Dataset
from dp_lora.errors import PRIVATE_PICTURE, InputError, private_names, shown

LONGEST = 2**16  # most bytes of a text file beside a picture
COLUMN = "text"  # if data.caption_column is null; diffusers and datasets use this name
SHOWN = 5  # most pictures without a caption that a message names


@dataclass(frozen=True)
class ListedPicture:
    """One picture of the folder, not yet opened; `file_name` is relative to the folder, with slashes."""

    file_name: str
    label: str | None
    person: str | None
    captions: tuple[str, ...] | None = None


def text_name(picture: str) -> str:
    """The name of a picture's text file: .txt replaces the last ending."""
    folder, slash, name = picture.rpartition("/")
    stem, dot, _ = name.rpartition(".")
    return f"{folder}{slash}{stem if stem and dot else name}.txt"


def lies_in(path: str, root: str) -> bool:
    """Whether a path, links followed, lies in the resolved folder `root`. Raises OSError for a path that is missing."""
    return Path(os.path.realpath(path, strict=True)).is_relative_to(root)


@private_names(PRIVATE_PICTURE)
def read_text(path: str, root: str) -> tuple[str, ...]:
    """The captions in a file, one a line; () for an empty or missing file. Raises InputError that names the file.

    `root`: the resolved folder of pictures; the caller knows that the file's parent folder lies in it.
    """
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise InputError(f"{shown(path)}: cannot be read: {error.strerror}") from None
    try:
        if stat.S_ISLNK(status.st_mode) and not lies_in(path, root):
            raise InputError(f"{shown(path)}: leads out of the folder; put the file itself there")
        with open(path, "rb") as file:
            content = file.read(LONGEST + 1)
        if len(content) > LONGEST:
            raise InputError(f"{shown(path)}: longer than a caption is ({LONGEST} bytes); shorten it, or move it away")
        text = content.decode("utf-8-sig")  # editors write a byte order mark
    except UnicodeDecodeError:
        raise InputError(f"{shown(path)}: not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{shown(path)}: cannot be read: {error.strerror or error}") from None
    return stripped(text.split("\n"))


def stripped(texts: Sequence[str]) -> tuple[str, ...]:
    """The texts without surrounding blanks; empty texts are dropped."""
    return tuple(text.strip() for text in texts if text.strip())


def of_a_table(value: Any) -> tuple[str, ...] | None:
    """Captions in a table's field, which holds a text or a list of texts; None for any other value."""
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    whole = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    return stripped(texts) if whole else None


@private_names(PRIVATE_PICTURE)
def all_or_none(pictures: list[ListedPicture], where: str, *, wanted: bool) -> list[ListedPicture]:
    """Keep the captions if every picture has some, else drop all.

    With `wanted` (data.captions) raises InputError that names pictures without one; `where` says how to add them.
    """
    without = [repr(picture.file_name) for picture in pictures if not picture.captions]
    if wanted and without:
        more = f" and {len(without) - SHOWN} more" if len(without) > SHOWN else ""
        raise InputError(f"data.captions=true: no caption: {', '.join(without[:SHOWN])}{more}; {where}")
    return [replace(picture, captions=None) for picture in pictures] if without else pictures


def texts_of(config: Config, dataset: Dataset) -> Sequence[Sequence[str]]:
    """The texts that condition each picture: its own captions, its class's public prompt, or one prompt for all.

    Raises InputError for data.captions=true and pictures without captions.
    """
    if config.data.prompts is not None:
        return [[config.data.prompts[label]] for label in dataset.labels]
    if config.data.prompt is not None:
        return [[config.data.prompt]] * len(dataset)
    if dataset.captions is None:
        raise InputError("data.captions=true: the prepared pictures have no captions; prepare them anew")
    return dataset.captions
