"""Captions of the user's own pictures: `picture.txt` beside `picture.png`, or a column of the table.

A caption is as private as its picture: no message has its text.
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

LONGEST = 2**16  # bytes of a text beside a picture
COLUMN = "text"  # where data.caption_column is null, as diffusers and datasets have it
SHOWN = 5  # of many pictures without a caption: so many are named


@dataclass(frozen=True)
class ListedPicture:
    """One picture of the folder, not yet opened; `file_name` is relative to the folder, with slashes."""

    file_name: str
    label: str | None
    person: str | None
    captions: tuple[str, ...] | None = None


def text_name(picture: str) -> str:
    """The name of the text that belongs to a picture: its last ending is another one."""
    folder, slash, name = picture.rpartition("/")
    stem, dot, _ = name.rpartition(".")
    return f"{folder}{slash}{stem if stem and dot else name}.txt"


def lies_in(path: str, root: str) -> bool:
    """Whether a file or folder lies in `root`, which is resolved, links followed. OSError where it is not there."""
    return Path(os.path.realpath(path, strict=True)).is_relative_to(root)


@private_names(PRIVATE_PICTURE)
def read_text(path: str, root: str) -> tuple[str, ...]:
    """The captions in a file, one a line; () where it is empty or not there. Raises InputError that names the file.

    `root` is the folder, resolved, that the file's own folder is known to lie in.
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
    """The texts without blanks around, empty ones left out."""
    return tuple(text.strip() for text in texts if text.strip())


def of_a_table(value: Any) -> tuple[str, ...] | None:
    """What a table's field says, a text or a list of texts; None where it is something else."""
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    whole = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    return stripped(texts) if whole else None


@private_names(PRIVATE_PICTURE)
def all_or_none(pictures: list[ListedPicture], where: str, *, wanted: bool) -> list[ListedPicture]:
    """The pictures, each with captions or none with any.

    With `wanted` (data.captions) InputError that names pictures without one; `where` says what to add them to.
    """
    without = [repr(picture.file_name) for picture in pictures if not picture.captions]
    if wanted and without:
        more = f" and {len(without) - SHOWN} more" if len(without) > SHOWN else ""
        raise InputError(f"data.captions=true: no caption: {', '.join(without[:SHOWN])}{more}; {where}")
    return [replace(picture, captions=None) for picture in pictures] if without else pictures


def texts_of(config: Config, dataset: Dataset) -> Sequence[Sequence[str]]:
    """What each picture is conditioned on: its own captions, its class's public prompt, or the one prompt of all.

    Raises InputError for data.captions=true and pictures without captions.
    """
    if config.data.prompts is not None:
        return [[config.data.prompts[label]] for label in dataset.labels]
    if config.data.prompt is not None:
        return [[config.data.prompt]] * len(dataset)
    if dataset.captions is None:
        raise InputError("data.captions=true: the prepared pictures have no captions; prepare them anew")
    return dataset.captions
