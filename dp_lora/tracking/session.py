"""Run a command in its own session, and end the whole session where the caller is stopped: no child is left behind."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

from dp_lora.tracking.process import stop_signals_deferred, stop_signals_wait

GRACE = 30.0  # seconds that a command has to end, and to keep what it can, before it is killed
PR_SET_PDEATHSIG = 1  # linux/prctl.h
LIBC = ctypes.CDLL(None)  # loaded before any fork: after a fork nothing may be imported
TIED = "DPLORA_TIED"  # environment variable of a tied command, for `end_with_caller`
INNER_GRACE = 20.0  # for a command that an entry point starts: shorter, so that the entry point outlives it


def run_in_session(
    command: Sequence[str],
    folder: Path | str,
    environment: Mapping[str, str],
    grace: float | None = None,
    **options: Any,
) -> int:
    """Run a command as the leader of a new session and return its exit status; `options` as `start_in_session`.

    Where the wait is interrupted, every process of the session's group is told to stop, and killed after `grace`
    seconds (None: GRACE), before the interruption is raised. SIGTERM interrupts inside `stop_signals_raise` alone.
    """
    child: subprocess.Popen[bytes] | None = None
    try:
        with stop_signals_deferred():
            child = start_in_session(command, folder, environment, **options)
        return child.wait()
    except BaseException:
        if child is not None:
            end_sessions([child], GRACE if grace is None else grace)
        raise


def start_in_session(
    command: Sequence[str],
    folder: Path | str,
    environment: Mapping[str, str],
    *,
    output: IO[bytes] | None = None,
    tied: bool = False,
) -> "subprocess.Popen[bytes]":
    """Start a command as the leader of a new session. `output` takes what it prints; None: our own output.

    The system kills a `tied` command when this thread ends, for whatever reason: even SIGKILL leaves no orphan that
    would hold a ledger. A process that it starts in turn ends likewise if it is tied too.
    """
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**environment, TIED: "1"} if tied else dict(environment),
        start_new_session=True,
        stdin=subprocess.DEVNULL if tied else None,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        preexec_fn=partial(_end_with, os.getpid()) if tied else None,  # noqa: PLW1509 (one call of the C library)
    )


def end_sessions(children: Sequence["subprocess.Popen[bytes]"], grace: float) -> None:
    """Tell every process of the sessions' groups to stop, and kill all that still run after `grace` seconds."""
    with stop_signals_wait():
        try:
            for child in children:
                _signal_group(child.pid, signal.SIGTERM)
            end = time.monotonic() + grace
            while time.monotonic() < end and any(_group_lives(child.pid) for child in children):
                for child in children:
                    child.poll()
                time.sleep(0.05)
        finally:
            # also where a second Ctrl-C cut the wait short
            for child in children:
                _signal_group(child.pid, signal.SIGKILL)
                child.wait()


def end_with_caller() -> None:
    """If the caller has set TIED, let the system kill this process when its parent ends.

    For processes that others start on our behalf: DVC starts a stage by its own means.
    """
    if os.environ.get(TIED):
        LIBC.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def _end_with(parent: int) -> None:
    """Between fork and exec: let the system kill this process when its parent ends."""
    LIBC.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # the parent had ended before
        os._exit(1)


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
