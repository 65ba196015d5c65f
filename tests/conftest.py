"""Fixtures of more than one file, and how threads wait."""

import os

# before torch is imported: threads that spin while they wait take the time of the tests' own child processes
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tests.prepare_call import project, store

__all__ = ["project", "store"]
