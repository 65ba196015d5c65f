"""Run a command in its own session, and end the whole session where the caller is stopped: no child is left behind."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from dp_lora.tracking.process import stop_signals_deferred, stop_signals_wait

GRACE = 30.0  # seconds that a command has to end, and to keep what it can, before it is killed
INNER_GRACE = 20.0  # for a command that an entry point starts: shorter, so that the entry point outlives it


def run_in_session(
    command: Sequence[str], folder: Path | str, environment: Mapping[str, str], grace: float | None = None
) -> int:
    """Run a command as the leader of a new session and return its exit status.

    Where the wait is interrupted, every process of the session's group is told to stop, and killed after `grace`
    seconds (None: GRACE), before the interruption is raised. SIGTERM interrupts inside `stop_signals_raise` alone.
    """
    child: subprocess.Popen[bytes] | None = None
    try:
        with stop_signals_deferred():
            child = subprocess.Popen(command, cwd=folder, env=dict(environment), start_new_session=True)
        return child.wait()
    except BaseException:
        if child is not None:
            with stop_signals_wait():
                _cancel(child, GRACE if grace is None else grace)
        raise


def _cancel(child: "subprocess.Popen[bytes]", grace: float) -> None:
    try:
        _signal_group(child.pid, signal.SIGTERM)
        end = time.monotonic() + grace
        while time.monotonic() < end and _group_lives(child.pid):
            child.poll()
            time.sleep(0.05)
    finally:
        # also where a second Ctrl-C cut the wait short
        _signal_group(child.pid, signal.SIGKILL)
        child.wait()


def _signal_group(group: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def _group_lives(group: int) -> bool:
    """Whether a process of the group still runs; a zombie does not count."""
    import psutil

    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return False
