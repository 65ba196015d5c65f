"""How far a unit that joins moves the sum of the others by rounding, with a tiny model, on a CPU and on a GPU."""

from pathlib import Path

import numpy as np
import torch

from dp_lora.models.device import full_precision
from dp_lora.privacy.rounding import rest
from dp_lora.training.private_loss import diffusion_loss
from tests.support.tiny import tiny_adapter, tiny_config, tiny_latents, tiny_model

# units, k, rows at a time: cases where k divides the rows or not, and where a picture's draws fit or not
ROUNDING_CASES = [
    *(("picture", k, rows) for k, rows in ((1, 8), (3, 8), (3, 9), (12, 8), (12, 200), (12, 204))),
    *(("person", k, rows) for k, rows in ((1, 12), (3, 25), (12, 8))),
]


def drawn(kind: str, n: int) -> tuple[list[list[int]], int]:
    """n units and one that joins (pictures, or persons of 2 to 4 pictures), and the number of pictures."""
    sizes = np.ones(n + 1, int) if kind == "picture" else np.random.default_rng(1).integers(2, 5, n + 1)
    stops = np.cumsum(sizes)
    return [list(range(stop - size, stop)) for size, stop in zip(sizes, stops, strict=True)], int(stops[-1])


def measured_rest(folder: Path, device: torch.device, precision: str, kind: str, n: int, k: int, rows: int) -> float:
    """`rest` when one unit joins `n` others, at this compute.precision; makes a model in `folder`."""
    units, pictures = drawn(kind, n)
    latents, labels = tiny_latents(pictures)
    model = tiny_model(folder, device=device)
    factory = diffusion_loss(tiny_config(f"compute.precision={precision}"), model, latents, labels, device)
    with full_precision():
        return rest(factory, tiny_adapter(model).parameters("AB"), units, k, rows)
