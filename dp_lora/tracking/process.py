"""The process that a run belongs to, the signals that stop it, and runs whose process died silently."""

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from dp_lora.tracking.outbox import waiting_runs
from dp_lora.tracking.records import DIED
from dp_lora.tracking.store import connect, one_line_errors, search_runs

if TYPE_CHECKING:
    from mlflow import MlflowClient

PAUSE_SIGNAL = signal.SIGUSR1  # from a batch system, before a time limit: the same run goes on later
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, PAUSE_SIGNAL)
TWICE = 2.0  # seconds: a batch system signals a process and its parent, which passes the signal on
JOB = "slurm.job"  # tag: the id of the job that a run is, or waits in


class Terminated(KeyboardInterrupt):
    """A signal stopped the process; the argument is the signal's name."""


class Paused(Terminated):
    """The signal's sender will start the process again, to go on in the same run."""


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        return ""


def _start_time(pid: int) -> str | None:
    """When a process of this pid namespace started, in clock ticks since boot; None if it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # the command's name, in parentheses, may hold blanks and parentheses itself
    state, *fields = text.rpartition(")")[2].split()
    return None if state in ("Z", "X") else fields[18]


def process_tags() -> dict[str, str]:
    """Tags that show later whether a run's process still lives: its pid alone may belong to another process by then."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "boot_id": _boot_id(),
        "pid": str(pid),
        "process": f"{_pid_namespace()}:{_start_time(pid)}",
    }


def has_died(tags: Mapping[str, str]) -> bool:
    """Whether the process of `process_tags` is certainly gone; False where this process cannot tell."""
    here = process_tags()
    namespace, _, started = tags.get("process", "").partition(":")
    if tags.get("host") != here["host"] or not tags.get("boot_id") or not here["boot_id"] or not started:
        return False
    if tags["boot_id"] != here["boot_id"]:
        return True
    # processes of another container can neither be seen nor ruled out from here
    return namespace == _pid_namespace() and _start_time(int(tags["pid"])) != started


def close_orphans(client: "MlflowClient | None" = None) -> list[str]:
    """Mark as KILLED the runs of this host that are RUNNING although their process has died; returns their ids.

    A run with records in the outbox is left alone: they may say how it ended. So is a job of Slurm, which may begin
    again: `jobs.settle_jobs` sets its state.
    """
    from mlflow.exceptions import MlflowException

    client = client or connect()
    with one_line_errors():
        condition = f"attributes.status = 'RUNNING' and tags.host = '{socket.gethostname()}'"
        running = search_runs(client, condition)
    waiting = waiting_runs()
    ours = [run for run in running if run.info.run_id not in waiting and JOB not in run.data.tags]
    dead = [run.info.run_id for run in ours if has_died(run.data.tags)]
    for run_id in dead:
        # on a shared server it may be another user's run: go on with the others
        with suppress(MlflowException):
            client.set_tag(run_id, "error", DIED)
            client.set_terminated(run_id, "KILLED")
    return dead


@contextmanager
def stop_signals_raise() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise Terminated, SIGUSR1 Paused, as Ctrl-C raises KeyboardInterrupt.

    Restores the old handlers at the end. A signal within TWICE of another counts as the same one: it must not cut
    short the work that the first one began.
    """
    owner = os.getpid()
    last = -math.inf

    def stop(number: int, _frame: FrameType | None) -> None:
        nonlocal last
        if os.getpid() != owner:
            # a forked worker inherits the handler, but not the run: it ends as it would have without us
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        before, last = last, time.monotonic()
        if last - before > TWICE:
            raise _stopped_by(number)

    with _handlers(stop):
        yield


@contextmanager
def stop_signals_wait() -> Iterator[None]:
    """Ignore SIGTERM, SIGHUP and SIGUSR1 for the moment that closing takes."""
    with _handlers(signal.SIG_IGN):
        yield


@contextmanager
def stop_signals_deferred() -> Iterator[None]:
    """Hold back Ctrl-C and these signals until the block ends: a process started in it can then be ended."""
    received: list[int] = []
    with _handlers(lambda number, _frame: received.append(number), (signal.SIGINT, *STOP_SIGNALS)):
        yield
    if received:
        raise _stopped_by(received[0])


def _stopped_by(number: int) -> Terminated:
    kind = Paused if number == PAUSE_SIGNAL else Terminated
    return kind(signal.Signals(number).name)


@contextmanager
def _handlers(handler: "signal._HANDLER", numbers: Sequence[signal.Signals] = STOP_SIGNALS) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        # only the main thread may set handlers
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    # a signal that the caller ignores, as nohup does with SIGHUP, stays ignored
    before = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
