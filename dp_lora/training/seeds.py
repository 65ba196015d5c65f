"""Seeded starts of networks without a mark on the process's own random state."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, stream: str) -> Iterator[None]:
    """Inside, torch's global generator, which networks start from, is keyed by (seed, stream); then it is as before."""
    key = int.from_bytes(hashlib.sha256(f"{stream}/{seed}".encode()).digest()[:8], "big") >> 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key)
        yield
