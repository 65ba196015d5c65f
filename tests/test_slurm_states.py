"""The states of a job, read from Slurm's output, and of its run; recorded texts show states that one node cannot."""

import os

import pytest

from dp_lora.errors import InputError
from dp_lora.slurm import commands
from dp_lora.slurm.states import Job, parse_accounted, parse_job, read_job

# output of Slurm 22.05's `scontrol --oneliner show job`; tests fill in STATE, EXIT and the fields around them
SHOWN = (
    "JobId=12 JobName=dp-lora-finetune UserId=user(1000) GroupId=user(1000) MCS_label=N/A Priority=4294901759 Nice=0 "
    "Account=(null) QOS=(null) JobState={state} Reason={reason} Dependency=(null) Requeue=1 Restarts={restarts} "
    "BatchFlag=1 Reboot=0 ExitCode={exit} RunTime=00:00:02 TimeLimit=1-00:00:00 TimeMin=N/A "
    "SubmitTime=2026-11-29T14:58:28 EndTime=2026-11-30T14:58:30 Deadline=N/A Partition=debug "
    "AllocNode:Sid=localhost:19919 NodeList=vm BatchHost=vm NumNodes=1 NumCPUs=1 NumTasks=1 CPUs/Task=1 "
    "ReqB:S:C:T=0:0:*:* TRES=cpu=1,node=1,billing=1 Command=/shared/runs/slurm/{run}/job.sh WorkDir=/shared "
    "Comment={run}  StdErr=/shared/job.log StdIn=/dev/null StdOut=/shared/job.log Power= \n"
)
RUN = "a" * 32


def shown(state: str, exit: str = "0:0", restarts: int = 0, reason: str = "None") -> str:
    return SHOWN.format(state=state, exit=exit, restarts=restarts, reason=reason, run=RUN)


def test_a_job_is_read_with_all_that_its_run_shows():
    assert parse_job(shown("PENDING", restarts=2, reason="Resources")) == Job("PENDING", 0, 0, 2, RUN, "Resources")
    assert parse_job(shown("FAILED", "0:9")) == Job("FAILED", 0, 9, 0, RUN)
    assert parse_job("JobId=3 JobState=RUNNING") == Job("RUNNING")


@pytest.mark.parametrize(
    ("state", "code", "status", "says"),
    [
        ("COMPLETED", "0:0", "FINISHED", ""),
        ("FAILED", "3:0", "FAILED", "exit status 3"),
        ("FAILED", "0:11", "KILLED", "ended by signal 11"),
        ("FAILED", "124:0", "KILLED", "stopped at its time limit (TIMEOUT)"),
        ("TIMEOUT", "0:15", "KILLED", "stopped at its time limit (TIMEOUT)"),
        ("CANCELLED", "0:15", "KILLED", "cancelled (CANCELLED)"),
        ("OUT_OF_MEMORY", "0:125", "KILLED", "out of memory (OUT_OF_MEMORY)"),
        ("NODE_FAIL", "1:0", "KILLED", "its node failed (NODE_FAIL)"),
        ("BOOT_FAIL", "0:0", "KILLED", "did not boot"),
        ("PREEMPTED", "0:15", "KILLED", "preempted"),
        ("DEADLINE", "0:0", "KILLED", "deadline"),
    ],
)
def test_the_way_in_which_a_job_ended_is_named(state, code, status, says):
    job = parse_job(shown(state, code))
    assert job.is_over
    assert job.ended_as[0] == status
    assert says in job.ended_as[1]


@pytest.mark.parametrize("state", ["PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"])
def test_a_job_that_waits_is_pending(state):
    assert parse_job(shown(state)).state == "PENDING"


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING", "SUSPENDED", "STAGE_OUT"])
def test_a_job_that_holds_its_node_is_running(state):
    assert parse_job(shown(state)).state == "RUNNING"


@pytest.mark.parametrize(
    ("row", "job"),
    [
        ("CANCELLED by 1000|0:15", Job("CANCELLED", 0, 15)),
        ("OUT_OF_MEMORY|0:125", Job("OUT_OF_MEMORY", 0, 125)),
        ("FAILED|124:0", Job("TIMEOUT", 124)),
        ("COMPLETED|0:0", Job("COMPLETED")),
    ],
)
def test_what_the_controller_has_forgotten_is_read_from_the_accounting(row, job):
    assert parse_accounted(row) == job


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stand-ins for Slurm's commands: each prints the text and returns the status that a test sets."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def says(name: str, text: str = "", error: str = "", status: int = 0) -> None:
        for stream, words in (("out", text), ("err", error)):
            (tmp_path / f"{name}.{stream}").write_text(words)
        cat = f'while read -r line; do echo "$line"; done < {tmp_path}/{name}.'
        (tmp_path / name).write_text(f"#!/bin/sh\n{cat}out\n{{ {cat}err; }} >&2\nexit {status}\n")
        (tmp_path / name).chmod(0o755)

    return says


UNKNOWN = "slurm_load_jobs error: Invalid job id specified\n"
AWAY = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n"


def test_a_job_that_nobody_knows_any_more_is_gone(slurm):
    slurm("scontrol", error=UNKNOWN, status=1)
    assert read_job("12") == Job("GONE")
    slurm("sacct", error="Slurm accounting storage is disabled\n", status=1)
    assert read_job("12").ended_as == ("KILLED", "the job is gone, and Slurm no longer says how it ended")
    slurm("sacct", text="TIMEOUT|0:15\n")
    assert read_job("12").state == "TIMEOUT"


def test_a_controller_that_is_away_says_nothing_of_a_job(slurm):
    slurm("scontrol", error=AWAY, status=1)
    with pytest.raises(commands.ControllerAway, match="Slurm's controller is away; try again") as error:
        read_job("12")
    assert "\n" not in str(error.value)


def test_commands_that_are_missing_or_refused_are_one_line(slurm, tmp_path):
    with pytest.raises(InputError, match=r"sbatch: not found; .* login node"):
        commands.submit(tmp_path / "job.sh")
    assert not commands.has_slurm()
    refused = "sbatch: error: invalid partition specified: nope\nsbatch: error: Batch job submission failed: Invalid\n"
    slurm("sbatch", error=refused, status=1)
    with pytest.raises(InputError) as error:
        commands.submit(tmp_path / "job.sh")
    assert str(error.value) == "sbatch: invalid partition specified: nope; Batch job submission failed: Invalid"
    slurm("sbatch", text="Submitted batch job 7\n")
    with pytest.raises(InputError, match="names no job id, but says: Submitted batch job 7"):
        commands.submit(tmp_path / "job.sh")
    slurm("sbatch", text="7\n")
    assert commands.submit(tmp_path / "job.sh") == "7"


def test_a_cluster_is_known_by_its_name(slurm):
    slurm("scontrol", text="AccountingStorageType = x\nClusterName             = one\n")
    assert commands.cluster_name() == "one"
    assert os.environ["PATH"]
