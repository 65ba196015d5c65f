"""Sample grids of one seed side by side, as data of the page itself."""

import base64
import io
import math
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from dp_lora.study.comparisons import NO_PRIVACY, Comparison
from dp_lora.study.rows import Row

WIDEST = 720  # pixels: a grid of large pictures is made smaller, so that the page can be sent by mail


@dataclass(frozen=True)
class SampleGrid:
    """One member's grid; `uri` holds the picture."""

    name: str
    seed: int
    uri: str
    width: int
    height: int
    link: str


def grids_of(comparison: Comparison, link: Callable[[Row], str]) -> list[SampleGrid]:
    """The grids of the seed that most conditions have, in the comparison's order; among equals the smallest seed.

    Conditions without that seed are left out: another seed's noise would differ too.
    """
    drawn = [[row for row in one.rows if row.grid is not None] for one in comparison.conditions]
    seeds = [row.outcome.member.seed for rows in drawn for row in rows]
    if not seeds:
        return []
    seed = min(set(seeds), key=lambda one: (-seeds.count(one), one))
    found = []
    for condition, rows in zip(comparison.conditions, drawn, strict=True):
        for row in rows:
            if row.outcome.member.seed == seed and row.grid is not None:
                uri, width, height = _uri(row.grid.read_bytes())
                name = comparison.shown(condition)
                if row.epsilon is not None and math.isinf(row.epsilon) and name != NO_PRIVACY:
                    name += ", not private"
                found.append(SampleGrid(name, seed, uri, width, height, link(row)))
    return found


def _uri(content: bytes) -> tuple[str, int, int]:
    with Image.open(io.BytesIO(content)) as picture:
        width, height = picture.size
        if width > WIDEST:
            width, height = WIDEST, round(height * WIDEST / width)
            written = io.BytesIO()
            picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS).save(written, "PNG", optimize=True)
            content = written.getvalue()
    return f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}", width, height
