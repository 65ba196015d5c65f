"""Send the records of runs that wait on this machine to their tracking server later."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from dp_lora.errors import InputError
from dp_lora.tracking.outbox import open_outbox
from dp_lora.tracking.process import close_orphans
from dp_lora.tracking.reachable import is_server
from dp_lora.tracking.sender import deliver
from dp_lora.tracking.store import connect, first_line, shown_uri, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient


def upload(run_ids: Iterable[str], say: Callable[[str], None]) -> list[str]:
    """Send the waiting records of these runs, with a line to `say` for each run; returns each run's problem, as a line.

    May be killed and repeated. Raises InputError if there is no tracking server.
    """
    if not is_server(tracking_uri()):
        raise InputError(f"MLFLOW_TRACKING_URI: is {shown_uri()}; set it to the server that the runs were recorded on")
    problems = []
    for run_id in run_ids:
        client = connect()  # fails within seconds if the server has gone
        try:
            with open_outbox(run_id) as outbox:
                number = len(outbox)
                _check(client, run_id)
                deliver(client, run_id, outbox, say)
            say(f"{run_id}: {number} records sent")
        except BlockingIOError:
            say(f"{run_id}: is at work, or being uploaded, and sends by itself")
        except Exception as error:
            problems.append(str(error) if isinstance(error, InputError) else f"{run_id}: {first_line(error)}")
    # the records that a killed process left are sent now, but none says that its run ended
    close_orphans()
    return problems


def _check(client: "MlflowClient", run_id: str) -> None:
    """Refuse a server that would refuse, and so lose, every record."""
    from mlflow.exceptions import MlflowException

    try:
        stage = client.get_run(run_id).info.lifecycle_stage
    except MlflowException as error:
        reason = f"{run_id}: {first_line(error)} in {shown_uri()}; set MLFLOW_TRACKING_URI to the run's own server"
        raise InputError(reason) from error
    if stage != "active":
        raise InputError(f"{run_id}: is deleted; type `mlflow runs restore --run-id {run_id}` first")
