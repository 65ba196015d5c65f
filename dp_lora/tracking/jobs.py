"""Runs that are jobs of Slurm: their tags, and the transfer of a job's state from Slurm to its run."""

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from dp_lora.errors import InputError
from dp_lora.slurm.commands import cluster_name, has_slurm
from dp_lora.slurm.states import GONE, Job, read_job
from dp_lora.tracking.ending import ended_by
from dp_lora.tracking.outbox import waiting_runs
from dp_lora.tracking.outside import end_from_outside
from dp_lora.tracking.process import JOB
from dp_lora.tracking.store import connect, joined_run_id, one_line_errors, search_runs

if TYPE_CHECKING:
    from mlflow import MlflowClient

CLUSTER = "slurm.cluster"
STATE = "slurm.state"  # PENDING, RUNNING, or Slurm's word for the job's end
RESTARTS = "slurm.restarts"
BACKEND = "mlflow.project.backend"


def own_job_tags(known: Mapping[str, str]) -> dict[str, str]:
    """Tags of the job that this process is in, for a run with the tags `known`; none where `-b slurm` did not make it.

    The job sets them itself: its sender may have been killed before it could.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or known.get(BACKEND) != "slurm":
        return {}
    restarts, cluster = os.environ.get("SLURM_RESTART_COUNT", "0"), os.environ.get("SLURM_CLUSTER_NAME")
    return {JOB: job, STATE: "RUNNING", RESTARTS: restarts} | ({CLUSTER: cluster} if cluster else {})


def settle_jobs(client: "MlflowClient | None" = None) -> None:
    """Update runs whose job has not ended, according to their own tags, from Slurm's present answer.

    Does nothing where this machine has no Slurm, where its controller is away, and for jobs of other clusters.
    """
    from mlflow.exceptions import MlflowException

    if not has_slurm():
        return
    client = client or connect()
    with one_line_errors():
        # PENDING and RUNNING: no word for a job's end has this ending
        unsettled = search_runs(client, f"tags.`{STATE}` LIKE '%ING'")
    # leave this process's own run to itself: it may be a job
    left = {*waiting_runs(), joined_run_id()}
    unsettled = [run for run in unsettled if run.info.run_id not in left]
    if not unsettled:
        return
    try:
        here = cluster_name()
        for run in unsettled:
            if run.data.tags.get(CLUSTER) == here and JOB in run.data.tags:
                job = read_job(run.data.tags[JOB])
                # on a shared server it may be another user's run: go on with the others
                with suppress(MlflowException):
                    record_job(client, run.info.run_id, job)
    except InputError:
        # the next command asks again
        return


def record_job(client: "MlflowClient", run_id: str, job: Job) -> bool:
    """Write Slurm's report of a job into its run; returns whether the store has taken all of it."""
    if job.comment not in ("", run_id):
        # Slurm has since given the number to another job
        job = Job(GONE)
    client.set_tag(run_id, STATE, job.state)
    client.set_tag(run_id, RESTARTS, str(job.restarts))
    if job.is_over:
        status, reason = job.ended_as if job.state != "FAILED" or job.signal else ended_by(job.exit_code)
        return end_from_outside(client, run_id, status, reason)
    if job.state == "PENDING" and client.get_run(run_id).info.status != "SCHEDULED":
        # Slurm took the job's node away, and will begin the job again
        client.update_run(run_id, status="SCHEDULED")
    return True
