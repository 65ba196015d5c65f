"""Memory of the private step, as a dry run tells of it: frozen weights, and a row's memory.

`models/row_memory.py` counts a row on networks without weights. For the members with most trained weights of the
shipped studies it was counted beforehand: torch, diffusers and PEFT take seconds to import.
"""

from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from dp_lora.config.schema import Config
from dp_lora.files import digest_value, read_json
from dp_lora.models.families import CLASSES
from dp_lora.models.shapes import BaseShapes, part_shapes
from dp_lora.models.shipped import FOLDER, counted_before, file_of

GPU_BYTES = 80 * 10**9  # of the GPU that a dry run names
USABLE = 0.9  # share of it, less fragments, kernels and their room
GIB = 2**30
COUNTED = FOLDER / "memory.json"  # rows that were counted beforehand, by `row_key`
ITEM = {"float32": 4, "bfloat16": 2}  # bytes of a number


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


def memory_line(config: Config, base: Path, shapes: BaseShapes) -> str:
    """A dry run's line: frozen parts, a row, and how many rows a GPU takes at a time."""
    row = row_before(config, shapes)
    if row is None:
        from dp_lora.models.row_memory import count_row  # torch, diffusers and PEFT

        row = count_row(config, base, shapes.family)
    precision = precision_of(config)
    encoders = ITEM[precision] * sum(_numbers(part_shapes(folder)) for folder in base.glob("text_encoder*"))
    frozen = row.weights + encoders + ITEM["float32"] * _numbers(shapes.vae)
    checkpointed = config.compute.checkpointing != "never"
    each, other = (row.checkpointed, row.kept) if checkpointed else (row.kept, row.checkpointed)
    rows = int((USABLE * GPU_BYTES - frozen) // each)
    return (
        f"{gibibytes(frozen)} GiB of frozen weights ({gibibytes(row.weights)} of the denoiser), "
        f"{gibibytes(each)} GiB a row ({gibibytes(other)} with{'out' if checkpointed else ''} checkpointing): "
        + (f"about {rows:,} rows at a time" if rows > 0 else "not one row")
        + f" on a GPU of 80 GB; counted in {precision}, not measured"
    )


def _numbers(tensors: Any) -> int:
    return sum(map(prod, tensors.values()))


def gibibytes(size: int) -> str:
    """A number of bytes in GiB, two digits."""
    return f"{size / GIB:.2g}" if size < 10 * GIB else f"{size / GIB:.0f}"
