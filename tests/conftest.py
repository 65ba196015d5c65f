"""Fixtures that several files share, and settings of the test process: waiting threads, Ctrl-C, time for slow tests."""

import os
import signal

import pytest

# set before torch is imported: threads that spin while they wait take time from the tests' own child processes
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    # with another test process on the machine, a second thread only waits
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.support.prepare_call import project, store

# a shell's background job ignores Ctrl-C and its children inherit that: a test's Ctrl-C would be lost
signal.signal(signal.SIGINT, signal.default_int_handler)

__all__ = ["project", "store"]

SLOW_LIMIT = 3600  # seconds; a host with other work on it takes many times as long as an idle one


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(SLOW_LIMIT))
