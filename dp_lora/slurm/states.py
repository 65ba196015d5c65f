"""The state of a job, read from Slurm's output, and the state that it means for the job's MLflow run."""

import re
from dataclasses import dataclass

from dp_lora.slurm.commands import accounted, shown_job

JOB_OF = "DPLORA_JOB_OF"  # variable of our jobs: the id of the run that the job is for, which is its comment too
NEAR_LIMIT = 124  # exit status of a batch script that was signalled before its time limit, and did not begin again
WAITS = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
WORKS = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
# state of a job that did not end by itself -> the same in words
ENDED_FROM_OUTSIDE = {
    "CANCELLED": "cancelled",
    "TIMEOUT": "stopped at its time limit",
    "OUT_OF_MEMORY": "out of memory",
    "NODE_FAIL": "its node failed",
    "BOOT_FAIL": "its node did not boot",
    "PREEMPTED": "preempted by another job",
    "DEADLINE": "could not end before its deadline",
    "REVOKED": "revoked by its cluster",
}
GONE = "GONE"  # our own state: the job is over, and nobody knows how it ended


@dataclass(frozen=True)
class Job:
    """Slurm's report of a job. `state`: PENDING, RUNNING, or Slurm's word for its end."""

    state: str
    exit_code: int = 0
    signal: int = 0  # signal that ended the batch script; 0: none
    restarts: int = 0
    comment: str = ""  # of our jobs: the run's id
    reason: str = ""  # why it waits, or ended

    @property
    def is_over(self) -> bool:
        return self.state not in ("PENDING", "RUNNING")

    def of(self, run_id: str) -> "Job":
        """This job where it is for a run; else GONE: Slurm has since given the number to another job."""
        return self if self.comment in ("", run_id) else Job(GONE)

    @property
    def ended_as(self) -> tuple[str, str]:
        """For a job that is over: MLflow's state of its run, and the reason in words, empty for FINISHED."""
        if self.state == "COMPLETED":
            return "FINISHED", ""
        if self.state == GONE:
            return "KILLED", "the job is gone, and Slurm no longer says how it ended"
        if self.state in ENDED_FROM_OUTSIDE:
            return "KILLED", f"Slurm: {ENDED_FROM_OUTSIDE[self.state]} ({self.state})"
        if self.signal:
            return "KILLED", f"Slurm: ended by signal {self.signal}"
        return "FAILED", f"Slurm: {self.state}, exit status {self.exit_code}"


def parse_job(text: str) -> Job:
    """The job in the output of `scontrol --oneliner show job ID`."""
    fields = dict(re.findall(r"(?:^|\s)([A-Za-z:/]+)=(\S*)", text))
    code, _, number = fields.get("ExitCode", "0:0").partition(":")
    restarts = fields.get("Restarts", "0")
    return Job(
        state=_state(fields.get("JobState", GONE), int(code)),
        exit_code=int(code),
        signal=int(number or 0),
        restarts=int(restarts) if restarts.isdigit() else 0,
        comment=fields.get("Comment", ""),
        reason="" if fields.get("Reason") in (None, "None") else fields["Reason"],
    )


def parse_accounted(row: str) -> Job:
    """The job in a row of `sacct --parsable2 --format=State,ExitCode`."""
    state, _, rest = row.partition("|")
    code, _, number = rest.strip().partition(":")
    # the state may be `CANCELLED by 1000`: its first word counts
    exit_code = int(code or 0)
    return Job(_state(state.split()[0] if state.split() else GONE, exit_code), exit_code, int(number or 0))


def _state(word: str, exit_code: int) -> str:
    if word in WAITS:
        return "PENDING"
    if word in WORKS:
        return "RUNNING"
    return "TIMEOUT" if word == "FAILED" and exit_code == NEAR_LIMIT else word


def read_job(job: str) -> Job:
    """The state of a job now. Raises ControllerAway, and InputError where Slurm's commands are missing."""
    text = shown_job(job)
    if text is not None:
        return parse_job(text)
    row = accounted(job)
    return Job(GONE) if row is None else parse_accounted(row)
