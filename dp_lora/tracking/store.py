"""Where runs are kept: the store's address, its client, the experiment that a new run belongs to."""

import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from dp_lora.config import PROJECT
from dp_lora.errors import InputError
from dp_lora.files import exclusive, naming_full_disk
from dp_lora.tracking.outbox import waiting_runs
from dp_lora.tracking.reachable import is_server, schema_problem, server_problem
from dp_lora.tracking.shared_view import VIEW, set_view

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

EXPERIMENT = "dp-lora"
ERROR_LENGTH = 500  # characters of an error that are kept as a tag
DOCKER_STORE = Path("/mlflow/tmp/mlruns")  # where MLflow's Docker runner mounts a SQLite store's file


def sqlite_uri(path: Path) -> str:
    """The URI of a SQLite store at an absolute path; % is encoded, since SQLAlchemy decodes %XX."""
    return "sqlite:///" + str(path).replace("%", "%25").replace("?", "%3F")


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite store, absolute, or None for another kind of store."""
    match = re.fullmatch(r"sqlite(?:\+\w+)?:///([^?]+)(?:\?.*)?", uri)
    return Path(os.path.abspath(unquote(match[1]))) if match else None


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or mlflow.db at the project's root; a relative SQLite path becomes absolute."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return sqlite_uri(PROJECT / "mlflow.db")
    path = sqlite_path(uri)
    if path == DOCKER_STORE:
        return sqlite_uri(_store_in_container(path))
    # a child process in another folder must find the same file
    return uri if path is None or "?" in uri else sqlite_uri(path)


def _store_in_container(mounted: Path) -> Path:
    """The project's own mlflow.db through the project's mount, not through the mount of MLflow's Docker runner.

    For the default, the relative sqlite:///mlflow.db, the runner mounts an empty folder; for an absolute path, the file
    alone, without the journal that keeps it whole. Raises InputError for a store elsewhere.
    """
    own = PROJECT / "mlflow.db"
    if own.is_file() and (mounted.is_dir() or (mounted.is_file() and mounted.samefile(own))):
        return own
    raise InputError(
        "tracking store: in a container only a server or the project's own mlflow.db can be used; "
        "set MLFLOW_TRACKING_URI to a server's address, or unset it and call from the project's root"
    )


def is_at_home() -> bool:
    """Whether the store is a file on this machine: files without a guarantee are sent to no other store."""
    return sqlite_path(tracking_uri()) is not None


def shown_uri() -> str:
    """The store's address without user name and password."""
    return re.sub(r"//[^/@]*@", "//", tracking_uri())


def first_line(error: BaseException | str) -> str:
    """The first line of an exception or a text, without credentials in addresses."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return re.sub(r"//[^/@\s]*@", "//", line)[:ERROR_LENGTH]


def connect(patience: float = 0.0) -> "MlflowClient":
    """A client of the store. Raises InputError where it cannot be opened, a server after `patience` seconds."""
    # else MLflow sends usage statistics to the internet
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # else MLflow shows bars for small files that take no time
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # else MLflow prints the traceback of an error that it raises too
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    path = sqlite_path(tracking_uri())
    if path is not None:
        there = next(place for place in (path, *path.parents) if place.exists())
        if not os.access(there, os.W_OK) or there.is_dir() == (there == path):
            # MLflow itself would try again for minutes
            raise InputError(f"tracking store {shown_uri()}: cannot be written; set MLFLOW_TRACKING_URI")
    problem = store_problem()
    if problem is not None and patience and is_server(tracking_uri()):
        print(f"tracking server {shown_uri()}: {problem.partition(';')[0]}; waiting for it", file=sys.stderr)
        end = time.monotonic() + patience
        while problem is not None and time.monotonic() < end:
            time.sleep(1)
            problem = store_problem()
    if problem is not None:
        raise InputError(f"tracking store {shown_uri()}: {problem}")
    from mlflow import MlflowClient

    # one process at a time: MLflow makes the tables of a new SQLite store without a lock of its own
    alone = nullcontext() if path is None else exclusive(path.with_name(f"{path.name}.lock"), wait=True)
    with one_line_errors(), alone:
        return MlflowClient(tracking_uri())


def store_problem() -> str | None:
    """The fault of the store, and what to do, found within seconds; None where it can be used."""
    uri = tracking_uri()
    if is_server(uri):
        return server_problem(uri)
    path = sqlite_path(uri)
    return None if path is None else schema_problem(path)


def naming_full_store() -> AbstractContextManager[None]:
    """Make a disk-full error of a local store an OSError that names its folder; a server's disk is not ours."""
    path = sqlite_path(tracking_uri())
    return nullcontext() if path is None else naming_full_disk(path.parent)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn errors of MLflow and its database into one line that names the store; a full disk is an OSError."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with naming_full_store():
            yield
    except (MlflowException, SQLAlchemyError) as error:
        raise InputError(f"tracking store {shown_uri()}: {first_line(error)}") from error


def joined_run_id() -> str | None:
    """The run that `mlflow run` made for this process, or None."""
    return os.environ.get("MLFLOW_RUN_ID") or None


def joined_run(client: "MlflowClient") -> "Run | None":
    """The run named by MLFLOW_RUN_ID. Raises InputError where the store has no such run."""
    from mlflow.exceptions import MlflowException

    run_id = joined_run_id()
    if run_id is None:
        return None
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        raise InputError(f"MLFLOW_RUN_ID={run_id}: {first_line(error)} in {shown_uri()}; unset it") from error


def experiment_id(client: "MlflowClient") -> str:
    """The id in MLFLOW_EXPERIMENT_ID, or of the experiment MLFLOW_EXPERIMENT_NAME, else `dp-lora`, made if new."""
    if identifier := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return identifier
    return named_experiment(client, os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT)


def search_runs(
    client: "MlflowClient", condition: str, experiments: Sequence[str] | None = None, **options: Any
) -> Sequence["Run"]:
    """Runs of `experiments`, by default of all, that meet `condition`; `options` go to MLflow's own search."""
    if experiments is None:
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    # MLflow refuses to search in no experiment
    return client.search_runs(list(experiments), condition, **options) if experiments else []


def named_experiment(client: "MlflowClient", name: str) -> str:
    """The id of an experiment, made if new; a local store keeps its artifacts in mlartifacts/ beside the database."""
    from mlflow.exceptions import MlflowException

    path = sqlite_path(tracking_uri())
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            location = None if path is None else (path.parent / "mlartifacts").as_uri()
            found = client.get_experiment(client.create_experiment(name, artifact_location=location))
        except MlflowException:
            # two processes may make it at once
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise InputError(
            f"experiment {name} is deleted in {shown_uri()}: restore it with "
            f"`mlflow experiments restore -x {found.experiment_id}`, or set MLFLOW_EXPERIMENT_NAME"
        )
    if VIEW not in found.tags:
        set_view(client, found)
    return found.experiment_id


def tag_text(value: Any) -> str:
    """The text of a value as a tag."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def fail_joined_run(message: str, child: bool = False) -> None:
    """Mark the run that `mlflow run` made as FAILED, after an error that came before our own run opened.

    A direct call has no such run: nothing is written. A stage that DVC started (`child`) leaves its parent's run to
    the parent. A run that has ended keeps its state, even where the state still waits in the outbox. `message` names
    nothing private. Never raises: the caller is about to report the error itself.
    """
    run_id = joined_run_id()
    if run_id is None or child or run_id in waiting_runs():
        return
    try:
        client = connect()
        if client.get_run(run_id).info.status in ("RUNNING", "SCHEDULED"):
            client.set_tag(run_id, "error", message[:ERROR_LENGTH])
            client.set_terminated(run_id, "FAILED")
    except Exception as error:
        print(f"run {run_id} could not be marked FAILED: {first_line(error)}", file=sys.stderr)
