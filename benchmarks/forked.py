"""Ranks as forks of this process, so that torch is imported once."""

import os
import sys
import traceback
from collections.abc import Callable


def run_forked(size: int, work: Callable[[int], None]) -> None:
    """Call `work` with its rank in each of `size` forks, and wait for all; end this process if one fails."""
    sys.stdout.flush()  # without it each fork would print the buffered text again
    children = []
    for rank in range(size):
        if child := os.fork():
            children.append(child)
            continue
        status = 1
        try:
            work(rank)
            sys.stdout.flush()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if sum(os.waitpid(child, 0)[1] for child in children):
        sys.exit(1)
