"""Send records to the store: at once or, while a tracking server is away, later and in their order."""

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeVar

from dp_lora.config import DP_LORA
from dp_lora.tracking import records
from dp_lora.tracking.outbox import Outbox, open_outbox, waiting_runs
from dp_lora.tracking.reachable import is_server, server_problem
from dp_lora.tracking.records import Record
from dp_lora.tracking.store import first_line, naming_full_store, shown_uri, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

PAUSE = 30.0  # least seconds between two checks whether a server is back
ANSWER = 5.0  # seconds that a server has to answer
COMMAND = f"{DP_LORA} upload"
Answer = TypeVar("Answer")


class Sender:
    """Sends the records of one run.

    From `keep_working` on, a record that a tracking server does not take goes to the run's outbox and the work goes on;
    `warn` gets a line. A record that the server refuses for good raises. Before that, and with another kind of store,
    every error is raised.
    """

    def __init__(self, client: "MlflowClient", run_id: str, warn: Callable[[str], None]):
        self._client = client
        self._run_id = run_id
        self._warn = warn
        self._keeps = False
        self._lock = threading.Lock()
        self._open = ExitStack()
        self._outbox: Outbox | None = None
        self._problem = ""  # why the last action failed
        self._next_look = 0.0

    def keep_working(self) -> None:
        """From here on the work goes on while a server is away."""
        self._keeps = is_server(tracking_uri())
        if self._keeps and self._run_id in waiting_runs():
            self._kept()

    def send(self, record: Record) -> None:
        """Send the record, or keep it in the outbox."""
        if not self._keeps:
            with naming_full_store():
                records.send(self._client, self._run_id, record)
            return
        with self._lock:
            if self._nothing_waits():
                if self._done(lambda: records.send(self._client, self._run_id, record)):
                    return
                self._say(f"{self._problem}; the work goes on, records wait in runs/outbox/{self._run_id}")
            self._kept().append(record)

    def ask(self, question: Callable[[], Answer]) -> Answer | None:
        """The store's answer; None, with a line, where a server is away."""
        if not self._keeps:
            return question()
        answers: list[Answer] = []
        with self._lock:
            if not self._nothing_waits() or not self._done(lambda: answers.append(question())):
                self._say(f"{self._problem}; the work goes on without its answer")
        return answers[0] if answers else None

    def is_away(self) -> bool:
        """Whether a tracking server is away at this moment."""
        return self._keeps and server_problem(tracking_uri(), ANSWER) is not None

    def last_status(self) -> str | None:
        """The run's end state if that waits in the outbox, else None."""
        last = self._outbox.last() if self._outbox is not None else None
        return last.content["status"] if last is not None and last.kind == "end" else None

    def close(self) -> bool:
        """Try to send once more; returns whether all records were sent. If not, a line says what to type."""
        with self._lock, self._open:
            self._next_look = 0.0
            sent = self._nothing_waits()
            if not sent and self._outbox is not None:
                where = f"{len(self._outbox)} records wait in runs/outbox/{self._run_id}"
                self._say(f"{self._problem}; {where}; when the server is back, type: {COMMAND}")
            self._outbox = None
        return sent

    def _nothing_waits(self) -> bool:
        """Whether all earlier records were sent; sends the waiting ones where the server is back."""
        if not self._outbox:
            return True
        if time.monotonic() < self._next_look:
            return False
        outbox, number = self._outbox, len(self._outbox)
        if not self._done(lambda: deliver(self._client, self._run_id, outbox, self._warn)):
            return False
        self._say(f"{number} records that waited were sent")
        return True

    def _done(self, action: Callable[[], object]) -> bool:
        """Do `action`; False, within seconds, where no server answers. Raises where the server refuses for good."""
        started = time.monotonic()
        problem = server_problem(tracking_uri(), ANSWER)
        if problem is None:
            try:
                action()
                return True
            except Exception as error:
                if records.is_refused(error):
                    raise
                problem = first_line(error)
        # a server that answers, but takes nothing, costs the client's retries: spend at most a tenth of the time so
        now = time.monotonic()
        self._next_look = now + max(PAUSE, 10 * (now - started))
        self._problem = problem.partition(";")[0]
        return False

    def _kept(self) -> Outbox:
        if self._outbox is None:
            self._outbox = self._open.enter_context(open_outbox(self._run_id, wait=True))
        return self._outbox

    def _say(self, text: str) -> None:
        self._warn(f"tracking server {shown_uri()}: {text}")


def deliver(client: "MlflowClient", run_id: str, outbox: Outbox, warn: Callable[[str], None]) -> None:
    """Send the waiting records in order. A record refused for good is dropped with a line; any other error raises."""
    while (record := outbox.first()) is not None:
        try:
            records.send(client, run_id, record)
        except Exception as error:
            if not records.is_refused(error):
                raise
            warn(f"refused by the tracking server and dropped: {_shown(record)}: {first_line(error)}")
        outbox.remove_first()


def _shown(record: Record) -> str:
    if record.path is not None:
        return record.path.name
    names = [name for value in record.content.values() if isinstance(value, Mapping) for name in value]
    return f"{record.kind} {', '.join(names)}".strip()[:100]
