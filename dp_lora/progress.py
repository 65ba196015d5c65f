"""One progress bar for all long work: on stderr, and seldom where nobody watches a terminal."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

PERCENT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"  # for private data: no count is shown


def progress(items: Iterable | None = None, **options: Any) -> tqdm:
    """A tqdm bar with the options given; in a log file it writes a line every 5 seconds at most."""
    return tqdm(items, file=sys.stderr, mininterval=0.5 if sys.stderr.isatty() else 5.0, **options)
