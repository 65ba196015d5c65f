"""An MLflow project backend: `mlflow run . -b slurm --backend-config FILE.json -e ENTRY` runs ENTRY as a job of Slurm.

The run is SCHEDULED until the job begins. From then on the entry point itself says in the run how it goes and how it
ends. What it cannot say, for it was killed or never began, is read from Slurm: by this process while it waits, else by
the next command of ours on the cluster.
"""

import logging
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import ExecutionException, MlflowException
from mlflow.projects.backend.abstract_backend import AbstractBackend
from mlflow.projects.submitted_run import SubmittedRun
from mlflow.projects.utils import (
    PROJECT_BUILD_IMAGE,
    PROJECT_DOCKER_ARGS,
    PROJECT_DOCKER_AUTH,
    PROJECT_ENV_MANAGER,
    PROJECT_STORAGE_DIR,
    PROJECT_SYNCHRONOUS,
    fetch_and_validate_project,
    load_project,
)

from dp_lora.config import STAGES, load
from dp_lora.errors import InputError
from dp_lora.files import private_folder, whole_file
from dp_lora.project_run import make_run, tag_run, use_project_store
from dp_lora.slurm.commands import cancel, cluster_name, submit
from dp_lora.slurm.script import Ranks, job_script
from dp_lora.slurm.settings import Settings, read_settings, require_gpus
from dp_lora.slurm.states import JOB_OF, Job, read_job
from dp_lora.slurm.waiting import pauses
from dp_lora.tracking.jobs import CLUSTER, STATE, record_job
from dp_lora.tracking.outside import end_from_outside
from dp_lora.tracking.process import JOB, stop_signals_deferred, stop_signals_raise, stop_signals_wait
from dp_lora.tracking.store import first_line

MLFLOWS_OWN = {
    PROJECT_BUILD_IMAGE,
    PROJECT_DOCKER_ARGS,
    PROJECT_DOCKER_AUTH,
    PROJECT_ENV_MANAGER,
    PROJECT_STORAGE_DIR,
    PROJECT_SYNCHRONOUS,
}
CANCELLING = 180.0  # seconds that a cancelled job has to end: Slurm itself kills after 30
# MLflow's own logger: its lines reach the terminal
logger = logging.getLogger("mlflow.projects")


class SlurmRun(SubmittedRun):
    """A run whose job was sent."""

    def __init__(self, client: MlflowClient, run_id: str, job: str):
        self._client, self._run_id, self._job = client, run_id, job

    @property
    def run_id(self) -> str:
        return self._run_id

    def wait(self) -> bool:
        """Wait for the end of the job; returns whether the run has FINISHED."""
        follow(self._client, self._run_id, self._job)
        return self.get_status() == "FINISHED"

    def get_status(self) -> str:
        return self._client.get_run(self._run_id).info.status

    def cancel(self) -> None:
        cancel(self._job)
        follow(self._client, self._run_id, self._job, CANCELLING)


class SlurmBackend(AbstractBackend):
    """Sends an entry point of an MLproject as a job; docs/clusters.md says what a site fills in."""

    def run(
        self,
        project_uri: str,
        entry_point: str,
        params: Mapping[str, str] | None,
        version: str | None,
        backend_config: Mapping[str, Any],
        tracking_uri: str,
        experiment_id: str,
    ) -> SlurmRun:
        """Send the job and, with wait=true, follow it to its end.

        Raises ExecutionException where it is refused or does not finish, KeyboardInterrupt where the wait is stopped.
        """
        with stop_signals_raise():
            try:
                given = {key: value for key, value in backend_config.items() if key not in MLFLOWS_OWN}
                settings = read_settings(given, Path(sys.prefix))
                work_dir = fetch_and_validate_project(project_uri, version, entry_point, params)
                project = load_project(work_dir)
                command = project.get_entry_point(entry_point).compute_command(params, None)
                ranks = _ranks(entry_point, params or {}, settings)
                cluster = cluster_name()
                experiment_id = use_project_store(experiment_id)
            except InputError as error:
                raise ExecutionException(str(error)) from error
            client = MlflowClient()
            with stop_signals_deferred():
                run_id = make_run(project_uri, experiment_id, work_dir, version, entry_point, params)
            try:
                tag_run(client, run_id, "slurm")
                variables = {"MLFLOW_RUN_ID": run_id, "MLFLOW_EXPERIMENT_ID": str(experiment_id), JOB_OF: run_id}
                script = job_script(settings, entry_point, command, ranks, variables)
                job = _send(client, run_id, cluster, script, Path(work_dir))
            except BaseException as error:
                stopped = isinstance(error, KeyboardInterrupt)
                with stop_signals_wait():
                    end_from_outside(client, run_id, "KILLED" if stopped else "FAILED", first_line(error))
                if stopped:
                    raise
                raise ExecutionException(f"Run (ID '{run_id}') failed: {first_line(error)}") from error
            logger.info("=== Run (ID '%s') is job %s of Slurm ===", run_id, job)
            sent = SlurmRun(client, run_id, job)
            if settings.wait:
                _wait(client, sent, job, settings)
            return sent


def _wait(client: MlflowClient, sent: SlurmRun, job: str, settings: Settings) -> None:
    run_id = sent.run_id
    try:
        last = follow(client, run_id, job)
    except KeyboardInterrupt as error:
        # a terminal that is closed takes no job with it
        if settings.on_interrupt == "leave" or str(error) == "SIGHUP":
            logger.error("=== Job %s goes on (Run ID '%s'); to end it: scancel %s ===", job, run_id, job)
            raise
        with stop_signals_wait():
            logger.error("=== Run (ID '%s') was stopped: job %s is cancelled ===", run_id, job)
            with suppress(InputError):
                sent.cancel()
        raise
    assert last is not None  # without a limit it waits for the end
    status, reason = last.ended_as
    with suppress(MlflowException):  # a server that is away: what Slurm says is all that is known
        found = client.get_run(run_id)
        status = found.info.status if found.info.status in ("FINISHED", "FAILED", "KILLED") else status
        reason = found.data.tags.get("error", reason)
    if status != "FINISHED":
        raise ExecutionException(f"Run (ID '{run_id}') {status.lower()}: job {job}: {reason or last.state}")
    logger.info("=== Run (ID '%s') succeeded ===", run_id)


def follow(client: MlflowClient, run_id: str, job: str, limit: float | None = None) -> Job | None:
    """Set in the run what Slurm says of its job until the job is over; the job then, or None after `limit` seconds.

    A controller or tracking server that is away ends nothing: a line says so, and the wait goes on.
    """
    began, known, told, waits = time.monotonic(), None, "", pauses()
    while True:
        problem = ""
        try:
            now = read_job(job)
            if now != known:
                record_job(client, run_id, now)
                known = now
            if now.is_over:
                return now
        except (InputError, MlflowException) as error:
            problem = first_line(error)
        if problem and problem != told:
            logger.warning("job %s: %s; the job goes on, and so does this wait", job, problem)
        told = problem
        if limit is not None and time.monotonic() - began > limit:
            return None
        time.sleep(next(waits))


def _send(client: MlflowClient, run_id: str, cluster: str, script: str, work_dir: Path) -> str:
    """Keep the script in the run and beside the job's output, and send it; returns the job's id."""
    # what a job prints is the operator's, as the terminal is
    folder = work_dir / "runs" / "slurm" / run_id
    private_folder(folder.parent)
    private_folder(folder)
    with whole_file(folder / "job.sh", private=True) as temporary:
        temporary.write_text(script, encoding="utf-8")
    client.log_artifact(run_id, str(folder / "job.sh"), "slurm")
    # before the job may begin and say RUNNING
    client.update_run(run_id, status="SCHEDULED")
    client.set_tag(run_id, CLUSTER, cluster)
    output = str(folder / "job.log").replace("%", "%%")
    job = None
    try:
        with stop_signals_deferred():
            job = submit(
                folder / "job.sh", f"--chdir={work_dir}", f"--output={output}", f"--comment={run_id}", "--export=ALL"
            )
            client.set_tag(run_id, JOB, job)
            client.set_tag(run_id, STATE, "PENDING")
    except BaseException:
        if job is not None:
            # nobody would know of it
            cancel(job)
        raise
    return job


def _ranks(entry_point: str, params: Mapping[str, str], settings: Settings) -> Ranks:
    """How many processes srun starts. InputError for a config that this job cannot run."""
    if entry_point not in STAGES:
        return Ranks()
    values = {name: value for name, value in params.items() if value != ""}
    name = values.pop("config", STAGES[entry_point].default_config)
    overrides = values.pop("overrides", "")
    known = {name: value for name, value in values.items() if name in STAGES[entry_point].sets}
    compute = load(name, known, overrides, stage=entry_point).compute
    require_gpus(settings, compute)
    if STAGES[entry_point].ranked:
        return Ranks(compute.devices, compute.num_nodes)
    if compute.num_nodes > 1:
        shown = f"compute.devices={compute.devices}, compute.num_nodes={compute.num_nodes}"
        raise InputError(f"{shown}: {entry_point} works on one machine; send finetune and sample apart")
    return Ranks()
