"""Runs that are jobs of Slurm: their tags, and the transfer of a job's state from Slurm to its run."""

import functools
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from dp_lora.errors import InputError
from dp_lora.slurm.commands import cluster_name, has_slurm
from dp_lora.slurm.states import ENDED_FROM_OUTSIDE, GONE, JOB_OF, Job, read_job
from dp_lora.tracking.ending import ended_by
from dp_lora.tracking.outbox import waiting_runs
from dp_lora.tracking.outside import end_from_outside
from dp_lora.tracking.process import JOB
from dp_lora.tracking.store import connect, joined_run_id, one_line_errors, search_runs

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

CLUSTER = "slurm.cluster"
STATE = "slurm.state"  # PENDING, RUNNING, or Slurm's word for the job's end
RESTARTS = "slurm.restarts"
REQUEUED = "REQUEUED"  # the state of a part whose job began again
KILLED_IN_JOB = "its process was killed in the job, which then went on to its end"
OF = "slurm.job_of"  # id of the run that the job is for; a part of it has a run of its own: a member, or a stage


def own_job_tags() -> dict[str, str]:
    """Tags of the job that this process is in, for the run that it opens; none outside of our jobs.

    The job sets them itself: its sender may have been killed before it could, and a member of a study, or a stage of
    `main`, has a run that its sender does not know.
    """
    job, run_id = os.environ.get("SLURM_JOB_ID"), os.environ.get(JOB_OF)
    if job is None or run_id is None:
        return {}
    restarts, cluster = os.environ.get("SLURM_RESTART_COUNT", "0"), os.environ.get("SLURM_CLUSTER_NAME")
    tags = {JOB: job, STATE: "RUNNING", RESTARTS: restarts, OF: run_id}
    return tags | ({CLUSTER: cluster} if cluster else {})


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
        here, asked = cluster_name(), functools.cache(read_job)
        for run in unsettled:
            if run.data.tags.get(CLUSTER) == here and JOB in run.data.tags:
                job, of = asked(run.data.tags[JOB]), run.data.tags.get(OF, run.info.run_id)
                # on a shared server it may be another user's run: go on with the others
                with suppress(MlflowException):
                    if of == run.info.run_id:
                        record_job(client, run.info.run_id, job)
                    else:
                        _record_part(client, run, job, of)
    except InputError:
        # the next command asks again
        return


def record_job(client: "MlflowClient", run_id: str, job: Job) -> bool:
    """Write Slurm's report of a job into its run; returns whether the store has taken all of it."""
    job = job.of(run_id)
    client.set_tag(run_id, STATE, job.state)
    client.set_tag(run_id, RESTARTS, str(job.restarts))
    if job.is_over:
        status, reason = job.ended_as if job.state != "FAILED" or job.signal else ended_by(job.exit_code)
        return end_from_outside(client, run_id, status, reason)
    if job.state == "PENDING" and client.get_run(run_id).info.status != "SCHEDULED":
        # Slurm took the job's node away, and will begin the job again
        client.update_run(run_id, status="SCHEDULED")
    return True


def _record_part(client: "MlflowClient", run: "Run", job: Job, of: str) -> None:
    """Write a job's end into the run of a part of it, which says itself how it ended, unless it was killed.

    Such a run does not go on where Slurm begins the job again: the new process opens another.
    """
    job = job.of(of)
    again = str(job.restarts) != run.data.tags.get(RESTARTS)
    if not (job.is_over or again or job.state == "PENDING"):
        return
    client.set_tag(run.info.run_id, STATE, job.state if job.is_over else REQUEUED)
    by_slurm = job.state in ENDED_FROM_OUTSIDE or job.state == GONE
    reason = job.ended_as[1] if by_slurm else KILLED_IN_JOB if job.is_over else "Slurm began its job again"
    # asked anew: it may have closed since it was found
    if client.get_run(run.info.run_id).info.status in ("RUNNING", "SCHEDULED"):
        end_from_outside(client, run.info.run_id, "KILLED", reason)
