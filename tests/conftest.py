"""Fixtures of more than one file."""

from tests.prepare_call import project, store

__all__ = ["project", "store"]
