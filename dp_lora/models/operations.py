"""What a base's networks compute for one row, as whoever made the base counted it: operations.json in its folder.

It follows from the architecture alone and is no part of the model: the folder's digest leaves it out.
"""

from dataclasses import dataclass, fields
from pathlib import Path

from dp_lora.errors import InputError
from dp_lora.files import read_json

FILE = "operations.json"


@dataclass(frozen=True)
class Operations:
    """Operations of matrix products and convolutions of one row (one noise draw of one picture), or of one picture."""

    forward: int  # of the UNet
    backward: int  # to the class embedding and to every activation after the first attention
    encode: int
    decode: int
    tokens: dict[str, int]  # rows of the matrix that each linear layer of the UNet multiplies, by its name


def read_operations(base: Path) -> Operations | None:
    """What the folder of a base states; None where it states nothing."""
    path = base / FILE
    if not path.exists():
        return None
    try:
        stated = read_json(path)
        return Operations(**{field.name: stated[field.name] for field in fields(Operations)})
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path}: cannot be read; delete it, then the base's networks are counted instead") from None
