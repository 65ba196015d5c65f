"""An MLflow project backend: `mlflow run . -b native -e ENTRY` runs ENTRY in the current environment, without Docker.

MLflow's command line waits only for its own backends, so that `run` blocks until the entry point has ended, and says
by an ExecutionException that it failed. The entry point runs in a session of its own; Ctrl-C, SIGTERM and SIGHUP end
the whole of it and leave the run KILLED.
"""

import logging
import os
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import ExecutionException
from mlflow.projects.backend.abstract_backend import AbstractBackend
from mlflow.projects.submitted_run import SubmittedRun
from mlflow.projects.utils import (
    PROJECT_STORAGE_DIR,
    fetch_and_validate_project,
    get_run_env_vars,
    load_project,
)

from dp_lora.errors import InputError
from dp_lora.project_run import make_run, tag_run, use_project_store
from dp_lora.tracking.ending import ended_by
from dp_lora.tracking.outside import end_from_outside
from dp_lora.tracking.process import close_orphans, stop_signals_deferred, stop_signals_raise, stop_signals_wait
from dp_lora.tracking.session import run_in_session
from dp_lora.tracking.store import first_line

# MLflow's own logger: its lines reach the terminal
logger = logging.getLogger("mlflow.projects")


class EndedRun(SubmittedRun):
    """A run that has FINISHED by the time that MLflow sees it."""

    def __init__(self, run_id: str):
        self._run_id = run_id

    @property
    def run_id(self) -> str:
        return self._run_id

    def wait(self) -> bool:
        return True

    def get_status(self) -> str:
        return "FINISHED"

    def cancel(self) -> None:
        """There is nothing left to cancel."""


class NativeBackend(AbstractBackend):
    """Runs an entry point of an MLproject in place and in this environment; docker_env and conda_env do not matter."""

    def run(
        self,
        project_uri: str,
        entry_point: str,
        params: Mapping[str, str] | None,
        version: str | None,
        backend_config: Mapping[str, Any],
        tracking_uri: str,
        experiment_id: str,
    ) -> EndedRun:
        """Run an entry point to its end. Raises ExecutionException where it fails, KeyboardInterrupt where stopped."""
        with stop_signals_raise():
            work_dir = fetch_and_validate_project(project_uri, version, entry_point, params)
            project = load_project(work_dir)
            try:
                experiment_id = use_project_store(experiment_id)
            except InputError as error:
                raise ExecutionException(str(error)) from error
            client = MlflowClient()
            run_id = ""
            try:
                with stop_signals_deferred():
                    run_id = make_run(project_uri, experiment_id, work_dir, version, entry_point, params)
                tag_run(client, run_id, "native")
                with tempfile.TemporaryDirectory(dir=backend_config.get(PROJECT_STORAGE_DIR)) as downloads:
                    command = project.get_entry_point(entry_point).compute_command(params, downloads)
                    logger.info("=== Running command '%s' in run with ID '%s' ===", command, run_id)
                    code = run_in_session(["bash", "-c", command], work_dir, _environment(run_id, experiment_id))
            except KeyboardInterrupt:
                if run_id:
                    with stop_signals_wait():
                        _end(client, run_id, "KILLED", "stopped by a signal")
                    logger.error("=== Run (ID '%s') was stopped ===", run_id)
                raise
            except Exception as error:
                if not run_id:
                    raise ExecutionException(first_line(error)) from error
                _end(client, run_id, "FAILED", first_line(error))
                raise ExecutionException(f"Run (ID '{run_id}') failed: {first_line(error)}") from error
            status, reason = ended_by(code)
            told = _end(client, run_id, status, reason)
        if status != "FINISHED":
            raise ExecutionException(f"Run (ID '{run_id}') {status.lower()}: {reason}")
        logger.info("=== Run (ID '%s') succeeded ===", run_id)
        if not told:
            # MLflow would try for minutes to set a tag on the server that is away, and fail
            sys.exit(0)
        return EndedRun(run_id)


def _environment(run_id: str, experiment_id: str) -> dict[str, str]:
    environment = os.environ | get_run_env_vars(run_id, experiment_id)
    # beside an id of the experiment MLflow refuses a name that differs
    environment.pop("MLFLOW_EXPERIMENT_NAME", None)
    environment["PATH"] = os.path.dirname(sys.executable) + os.pathsep + environment.get("PATH", os.defpath)
    return environment


def _end(client: MlflowClient, run_id: str, status: str, reason: str) -> bool:
    told = end_from_outside(client, run_id, status, reason)
    if status != "FINISHED" and told:
        # stages that the command had started may have died with it
        close_orphans(client)
    return told
