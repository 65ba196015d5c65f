"""Random streams of public trainings: keyed by name and numbers, without changing the process's own state."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def stream_key(stream: str, *numbers: int) -> int:
    """A seed for torch, 63 bits, that belongs to this stream and these numbers alone."""
    name = "/".join([stream, *map(str, numbers)])
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


@contextmanager
def seeded(seed: int, stream: str) -> Iterator[None]:
    """Inside, torch's global generator, which initialises networks, is keyed by (seed, stream); then it is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_key(stream, seed))
        yield
