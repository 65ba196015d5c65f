"""A row's memory as it was counted beforehand, for the members with most trained weights of the shipped studies.

`models/row_memory.py` counts it on networks without weights: torch, diffusers and PEFT take seconds to import.
"""

from dataclasses import asdict, dataclass

from dp_lora.config.schema import Config
from dp_lora.files import digest_value, read_json
from dp_lora.models.families import CLASSES
from dp_lora.models.shapes import BaseShapes
from dp_lora.models.shipped import FOLDER, counted_before, file_of

COUNTED = FOLDER / "memory.json"  # rows that were counted beforehand, by `row_key`


@dataclass(frozen=True)
class RowMemory:
    """Bytes that one row (one noise draw of one picture) holds until its gradient is there, the gradient included."""

    kept: int
    checkpointed: int  # with compute.checkpointing
    weights: int  # of the frozen denoiser, once for all rows


def precision_of(config: Config) -> str:
    """The precision in which a GPU runs the private step: float32 or bfloat16."""
    return "float32" if config.compute.precision == "float32" else "bfloat16"


def row_key(config: Config) -> str:
    """The name of a row's count: a digest of all settings that the row's memory depends on."""
    lora = {key: value for key, value in asdict(config.lora).items() if key != "alpha"}
    return digest_value([file_of(config).stem, lora, config.data.size, precision_of(config)])[:16]


def row_before(config: Config, shapes: BaseShapes) -> RowMemory | None:
    """A row's memory as it was counted beforehand; None where the base is another one, or the row was not counted."""
    network = counted_before(config)
    if network is None or shapes.family is not CLASSES:
        return None
    if (shapes.denoiser, shapes.vae) != (network.denoiser, network.vae):
        return None
    found = read_json(COUNTED).get(row_key(config))
    return None if found is None else RowMemory(**found)
