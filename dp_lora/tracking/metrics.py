"""Metrics are kept in memory and sent in batches from a thread, so that logging one costs microseconds."""

import math
import re
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from dp_lora.tracking.records import is_refused

if TYPE_CHECKING:
    from mlflow.entities import Metric

BATCH = 1000  # MLflow's limit
SECONDS = 3.0  # between two batches


def metric_key(name: str) -> str:
    """The name under which the store has a metric: characters that MLflow forbids become underscores."""
    return re.sub(r"[^\w\-. :/]", "_", name)


class MetricBuffer:
    """Collects scalars and hands them to `send` in lists of at most BATCH, every few seconds and at close.

    If `send` raises, as with a locked local store, the list is sent again later; `warn` gets one line when that
    begins. A list that the store refuses for good is dropped, with a line to `warn`.
    """

    def __init__(self, send: Callable[[list["Metric"]], object], warn: Callable[[str], None], seconds: float = SECONDS):
        self._send = send
        self._warn = warn
        self._seconds = seconds
        self._waiting: list[Metric] = []
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._stopped = threading.Event()
        self._behind = False
        self._thread: threading.Thread | None = None

    def add(self, name: str, value: float, step: int | None) -> None:
        """Take one scalar, kept under `metric_key(name)`; nan and inf are allowed."""
        from mlflow.entities import Metric

        metric = Metric(metric_key(name), float(value), time.time_ns() // 1_000_000, 0 if step is None else int(step))
        with self._lock:
            self._waiting.append(metric)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="metrics", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while not self._stopped.wait(self._seconds):
            self.flush()

    def flush(self) -> bool:
        """Send all waiting metrics; returns whether none is left."""
        with self._sending:
            while True:
                with self._lock:
                    batch = self._waiting[:BATCH]
                if not batch:
                    self._behind = False
                    return True
                try:
                    self._send(batch)
                except Exception as error:
                    if not is_refused(error):
                        if not self._behind:
                            self._warn(f"metrics wait: the tracking store does not take them ({type(error).__name__})")
                        self._behind = True
                        return False
                    self._warn(f"{len(batch)} metrics dropped: {str(error).splitlines()[0]}")
                with self._lock:
                    del self._waiting[: len(batch)]

    def close(self) -> None:
        """Stop the thread and send the rest."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        if not self.flush():
            self._warn(f"{len(self._waiting)} metrics were lost: the tracking store did not take them")


def number_text(value: float) -> str:
    """A number as people write it: 5, 0.5, inf."""
    return "inf" if math.isinf(value) else f"{value:g}"
