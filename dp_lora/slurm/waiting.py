"""How often Slurm's controller is asked about a job."""

import time
from collections.abc import Iterator

SHORTEST, LONGEST = 1.0, 15.0  # seconds between two questions


def pauses() -> Iterator[float]:
    """Seconds between two questions: few at first, since a small job ends soon."""
    began = time.monotonic()
    while True:
        yield min(LONGEST, SHORTEST + (time.monotonic() - began) / 30)
