"""Memory of the private step, as a dry run tells of it: frozen weights, and a row's memory."""

from math import prod
from pathlib import Path
from typing import Any

from dp_lora.config.schema import Config
from dp_lora.models.counted_rows import precision_of, row_before
from dp_lora.models.shapes import BaseShapes, part_shapes

GPU_BYTES = 80 * 10**9  # of the GPU that a dry run names
USABLE = 0.9  # share of it, less fragments, kernels and their room
GIB = 2**30
ITEM = {"float32": 4, "bfloat16": 2}  # bytes of a number


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
