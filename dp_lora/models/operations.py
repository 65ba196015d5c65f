"""Operations of a base's networks for one row, counted by the base's maker: operations.json in its folder.

It follows from the architecture alone and is no part of the model: the folder's digest leaves it out.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path

from dp_lora.errors import InputError
from dp_lora.files import digest_value, read_json, write_json
from dp_lora.models.pipeline_index import family_of, part_config

FILE = "operations.json"


@dataclass(frozen=True)
class Operations:
    """Operations of matrix products and convolutions of one row (one noise draw of one picture), or of one picture."""

    forward: int  # of the UNet
    backward: int  # to the class embedding and to every activation after the first attention
    encode: int
    decode: int
    tokens: dict[str, int]  # rows of the matrix that each linear layer of the UNet multiplies, by its name


def pipeline_key(base: Path, size: int) -> str:
    """Key of all that determines a pipeline's operations: its networks' configs, and the pictures' side in pixels."""
    return digest_value([part_config(base, family_of(base).part), part_config(base, "vae"), size])


def read_operations(base: Path, key: str | None = None) -> Operations | None:
    """The operations in a base's folder; None where it has none, or for a pipeline with another `pipeline_key`.

    A base that was made here states no key: it was counted in the size of its pictures.
    """
    path = base / FILE
    if not path.exists():
        return None
    try:
        stated = read_json(path)
        if stated.get("key", key) != key:
            return None
        return Operations(**{field.name: stated[field.name] for field in fields(Operations)})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: cannot be read; delete it, then the base's networks are counted instead") from None


def write_operations(base: Path, operations: Operations, key: str) -> None:
    """Write the operations of a pipeline's networks into its folder."""
    write_json(base / FILE, {"key": key, **asdict(operations)})
