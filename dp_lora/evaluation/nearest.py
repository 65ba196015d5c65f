"""Distances between all rows of two sets, block by block: memory does not grow with their numbers' product."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ROWS, OTHERS = 2048, 4096  # most rows of a block: 64 MiB of distances
VALUES = 2**24  # most values of a side of a block: 128 MiB

Rows = NDArray[np.float32] | NDArray[np.uint8]


def _parts(rows: Rows, at_most: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """The rows (n, d) as float64 on `device`, a block at a time, each with the position of its first."""
    step = max(1, min(at_most, VALUES // rows.shape[1]))
    for start in range(0, len(rows), step):
        yield start, torch.from_numpy(rows[start : start + step]).to(device, torch.float64)


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    # one product in place of all differences; in float64 it is exact for pixels, which are whole numbers
    return torch.cdist(rows, others, compute_mode="use_mm_for_euclid_dist")


def nearest(rows: Rows, others: Rows, device: torch.device) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Euclidean distance of each row (n, d) to the nearest of `others` (m, d), and that one's position; (n,) each."""
    found, places = [], []
    for _, part in _parts(rows, ROWS, device):
        least = torch.full((len(part),), torch.inf, dtype=torch.float64, device=device)
        place = torch.zeros(len(part), dtype=torch.int64, device=device)
        for start, other in _parts(others, OTHERS, device):
            here, where = _distances(part, other).min(dim=1)
            closer = here < least
            least, place = torch.where(closer, here, least), torch.where(closer, where + start, place)
        found.append(least.cpu().numpy())
        places.append(place.cpu().numpy())
    return np.concatenate(found), np.concatenate(places)


def radii(rows: Rows, k: int, device: torch.device) -> NDArray[np.float64]:
    """Distance of each row (n, d) to its k-th nearest other row, (n,); n must be above k."""
    if len(rows) <= k:
        raise ValueError(f"{len(rows)} rows have no {k}-th nearest other row")
    found = []
    for begin, part in _parts(rows, ROWS, device):
        least = torch.full((len(part), k), torch.inf, dtype=torch.float64, device=device)
        for start, other in _parts(rows, OTHERS, device):
            here = _distances(part, other)
            # each row's own position in this block
            own = torch.arange(len(part), device=device) + (begin - start)
            inside = (own >= 0) & (own < len(other))
            here[inside, own[inside]] = torch.inf
            least = torch.cat([least, here], dim=1).topk(k, dim=1, largest=False).values
        found.append(least.amax(dim=1).cpu().numpy())
    return np.concatenate(found)


def within(rows: Rows, centres: Rows, radius: NDArray[np.float64], device: torch.device) -> NDArray[np.bool_]:
    """Whether each row (n, d) lies within `radius` (m,) of at least one of `centres` (m, d); (n,)."""
    found = []
    for _, part in _parts(rows, ROWS, device):
        covered = torch.zeros(len(part), dtype=torch.bool, device=device)
        for start, other in _parts(centres, OTHERS, device):
            limits = torch.from_numpy(radius[start : start + len(other)]).to(device)
            covered |= (_distances(part, other) <= limits).any(dim=1)
        found.append(covered.cpu().numpy())
    return np.concatenate(found)
