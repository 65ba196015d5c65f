"""Run members side by side through one small interface; the executor here starts processes of this machine."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dp_lora.config import ROOT
from dp_lora.files import private_folder
from dp_lora.tracking.process import stop_signals_deferred
from dp_lora.tracking.session import end_sessions, start_in_session

GRACE = 25.0  # seconds: longer than a member gives its stage, shorter than `mlflow run` gives this process
LOOK_EVERY = 0.5  # seconds


@dataclass(frozen=True)
class Task:
    """A member that is to be made."""

    number: int
    command: Sequence[str]
    release: str  # tasks with the same one share a ledger: the second begins when the first has ended


class Executor(Protocol):
    """Starts members; `command` makes the whole of one, wherever it runs."""

    def has_room(self) -> bool:
        """Whether another member may be started now."""

    def start(self, task: Task) -> None:
        """Start a member."""

    def ended(self) -> Mapping[int, int]:
        """Exit status, by number, of the members that have ended since the last call."""

    def close(self) -> None:
        """End all that still run, and wait for their end."""


class Local:
    """Processes of this machine, `jobs` at a time; they end with this process, however it ends."""

    def __init__(self, jobs: int, logs: Path, environment: Mapping[str, str]) -> None:
        self._jobs, self._logs = jobs, private_folder(logs)
        self._environment = {**os.environ, **environment, **_threads(jobs)}
        self._running: dict[int, subprocess.Popen[bytes]] = {}

    def has_room(self) -> bool:
        return len(self._running) < self._jobs

    def start(self, task: Task) -> None:
        with stop_signals_deferred(), (self._logs / f"{task.number}.txt").open("wb") as log:
            started = start_in_session(task.command, ROOT, self._environment, output=log, tied=True)
            self._running[task.number] = started

    def ended(self) -> Mapping[int, int]:
        found = {number: status for number, child in self._running.items() if (status := child.poll()) is not None}
        for number in found:
            del self._running[number]
        return found

    def close(self) -> None:
        end_sessions(list(self._running.values()), GRACE)
        self._running.clear()


def _threads(jobs: int) -> dict[str, str]:
    """Share out this process's cores: members that each take all of them slow each other down."""
    if jobs == 1:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // jobs))}


def run_all(
    tasks: Sequence[Task],
    executor: Executor,
    started: Callable[[int], None],
    ended: Callable[[int, int], None],
    look: Callable[[], None],
) -> None:
    """Make all tasks, in their order as far as there is room. `look` is called now and then.

    A task that fails stops no other one. Where this is interrupted, those that run are ended first.
    """
    waiting, running = list(tasks), dict[int, Task]()
    try:
        while waiting or running:
            held = {task.release for task in running.values()}
            for task in list(waiting):
                if executor.has_room() and task.release not in held:
                    executor.start(task)
                    started(task.number)
                    running[task.number] = task
                    held.add(task.release)
                    waiting.remove(task)
            for number, status in executor.ended().items():
                del running[number]
                ended(number, status)
            look()
            if running:
                time.sleep(LOOK_EVERY)
    finally:
        executor.close()


def how_it_ended(status: int) -> str:
    """An exit status in words."""
    return f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
