"""End a run from another process than its own: from its starter, or from a reader of its job's state."""

import logging
from typing import TYPE_CHECKING

from dp_lora.tracking import records
from dp_lora.tracking.sender import Sender
from dp_lora.tracking.store import ERROR_LENGTH

if TYPE_CHECKING:
    from mlflow import MlflowClient

# MLflow's own logger: its lines reach the terminal
logger = logging.getLogger("mlflow.projects")


def end_from_outside(client: "MlflowClient", run_id: str, status: str, reason: str) -> bool:
    """Set the state that a process's end implies; the run's own state and error stay where the two agree.

    While the tracking server is away, the records wait in the run's outbox. Returns whether all of them were sent.
    """
    sender = Sender(client, run_id, logger.warning)
    sender.keep_working()
    found = sender.ask(lambda: client.get_run(run_id))
    waiting = sender.last_status()
    said = waiting or ("RUNNING" if found is None else found.info.status)
    explained = waiting in ("FAILED", "KILLED") or (found is not None and "error" in found.data.tags)
    if reason and not explained:
        sender.send(records.tags({"error": reason[:ERROR_LENGTH]}))
    is_open = said in ("RUNNING", "SCHEDULED")
    if is_open or (said == "FINISHED" and status == "FAILED") or (said == "FAILED" and status == "KILLED"):
        sender.send(records.end(status))
    return sender.close()
