"""`-b slurm` with stand-ins for Slurm's commands: the job that it sends, and the run that follows the job."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dp_lora import slurm_backend
from dp_lora.config import load
from dp_lora.errors import InputError
from dp_lora.slurm.script import Ranks
from dp_lora.slurm.settings import Environment, Settings
from dp_lora.tracking import jobs, opening
from dp_lora.tracking.process import Terminated
from tests.support.tracking_store import all_runs, artifacts, made_run, use_store

MLPROJECT = """
name: tiny
entry_points:
  main:
    parameters:
      config: {type: string, default: one}
    command: "python work.py {config}"
"""
SCONTROL = """
cd {here}
[ -e away ] && {{ echo "error: Unable to contact slurm controller (connect failure)" >&2; exit 1; }}
case "$*" in
    "show config") echo "ClusterName             = one" ;;
    *"show job"*) [ -e state ] || {{ echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }}
        echo "JobId=7 JobState=$(cat state) Restarts=$(cat restarts) ExitCode=$(cat exit) Comment=$(cat comment)" ;;
esac
"""


class Cluster:
    """The answers of the stand-ins, and the arguments that they got."""

    def __init__(self, here: Path):
        self.here = here
        (here / "exit").write_text("0:0")
        self.restarts(0)
        self.command("scontrol", SCONTROL.format(here=here))
        comment = 'for word in "$@"; do case $word in --comment=*) printf %s "${word#*=}" > comment ;; esac; done'
        self.command("sbatch", f'cd {here}; printf "%s\\n" "$@" > given; {comment}; echo 7')
        self.command("scancel", f"echo CANCELLED > {here}/state; echo $1 > {here}/cancelled")

    def command(self, name: str, text: str) -> None:
        (self.here / name).write_text(f"#!/bin/bash\n{text}\n")
        (self.here / name).chmod(0o755)

    def say(self, state: str, code: str = "0:0") -> None:
        (self.here / "state").write_text(state)
        (self.here / "exit").write_text(code)

    def restarts(self, number: int) -> None:
        (self.here / "restarts").write_text(str(number))

    @property
    def given(self) -> list[str]:
        return (self.here / "given").read_text().splitlines()


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    here = tmp_path / "slurm"
    here.mkdir()
    monkeypatch.setenv("PATH", f"{here}:{os.environ['PATH']}")
    for name in ("SLURM_JOB_ID", "SLURM_CLUSTER_NAME", "SLURM_RESTART_COUNT", "DPLORA_JOB_OF"):
        monkeypatch.delenv(name, raising=False)
    return Cluster(here)


@pytest.fixture
def client(tmp_path, monkeypatch):
    (tmp_path / "MLproject").write_text(MLPROJECT)
    monkeypatch.chdir(tmp_path)
    yield use_store(tmp_path, monkeypatch)
    # undo it: the backend sets the tracking URI for the whole process
    import mlflow

    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]


def send(config: str = "one", **settings):
    import mlflow

    backend = slurm_backend.SlurmBackend()
    given = {"SYNCHRONOUS": False, **settings}
    return backend.run(".", "main", {"config": config}, None, given, mlflow.get_tracking_uri(), "0")


def refused(**settings) -> str:
    from mlflow.exceptions import ExecutionException

    with pytest.raises(ExecutionException) as error:
        send(**settings)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(autouse=True)
def any_entry_point(monkeypatch):
    # the tiny project's `main` takes no config
    monkeypatch.setattr(slurm_backend, "STAGES", {})


def test_a_job_that_ends_well_finishes_its_run_which_keeps_the_script(cluster, client, tmp_path, capfd):
    cluster.say("COMPLETED")
    run = client.get_run(send("a b; touch PWN", partition="gpu").run_id)
    assert run.info.status == "FINISHED"
    tags = run.data.tags
    assert (tags["slurm.job"], tags["slurm.cluster"], tags["slurm.state"]) == ("7", "one", "COMPLETED")
    assert tags["mlflow.project.backend"] == "slurm"
    script = (artifacts(run.info.run_id) / "slurm/job.sh").read_text()
    assert "#SBATCH --partition=gpu" in script
    assert "mlflow.db" not in script
    kept = tmp_path / f"runs/slurm/{run.info.run_id}"
    assert {"--export=ALL", f"--comment={run.info.run_id}", f"--output={kept}/job.log", f"--chdir={tmp_path}"} <= {
        *cluster.given
    }
    assert (kept / "job.sh").read_text() == script
    assert (kept.stat().st_mode & 0o777, kept.parent.stat().st_mode & 0o777) == (0o700, 0o700)


@pytest.mark.parametrize(
    ("state", "code", "status", "says"),
    [
        ("FAILED", "3:0", "FAILED", "exit status 3"),
        ("FAILED", "137:0", "KILLED", "ended by SIGKILL"),
        ("TIMEOUT", "0:15", "KILLED", "Slurm: stopped at its time limit (TIMEOUT)"),
        ("OUT_OF_MEMORY", "0:125", "KILLED", "Slurm: out of memory (OUT_OF_MEMORY)"),
        ("NODE_FAIL", "1:0", "KILLED", "Slurm: its node failed (NODE_FAIL)"),
    ],
)
def test_a_job_that_ends_otherwise_ends_the_run_and_the_caller_so(cluster, client, state, code, status, says):
    cluster.say(state, code)
    assert f"{status.lower()}: job 7: {says}" in refused()
    (run,) = all_runs(client)
    assert (run.info.status, run.data.tags["error"], run.data.tags["slurm.state"]) == (status, says, state)


def test_what_the_run_has_said_of_itself_stays(cluster, client):
    cluster.say("FAILED", "1:0")
    run_id = send(wait=False).run_id
    client.set_tag(run_id, "error", "privacy.eps=0: must be above 0")
    client.set_terminated(run_id, "FAILED")
    jobs.settle_jobs(client)
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["error"]) == ("FAILED", "privacy.eps=0: must be above 0")
    assert run.data.tags["slurm.state"] == "FAILED"


def test_what_is_wrong_before_a_job_is_sent_makes_no_run(cluster, client, monkeypatch):
    assert refused(partitions="gpu") == "backend config: no key 'partitions'; did you mean partition?"
    (cluster.here / "away").touch()
    assert "Slurm's controller is away" in refused()
    monkeypatch.setenv("PATH", "/nowhere")
    assert "scontrol: not found" in refused()
    assert all_runs(client) == []


def test_a_job_that_slurm_refuses_fails_the_run_in_slurms_words(cluster, client):
    cluster.command("sbatch", 'echo "sbatch: error: Batch job submission failed: Invalid account" >&2; exit 1')
    assert "failed: sbatch: Batch job submission failed: Invalid account" in refused()
    (run,) = all_runs(client)
    assert run.info.status == "FAILED"
    assert run.data.tags["error"] == "sbatch: Batch job submission failed: Invalid account"
    assert "slurm.job" not in run.data.tags


def replace_sleep(monkeypatch, sleep):
    """Replace it in the backend alone: other threads of this process sleep too."""
    monkeypatch.setattr(slurm_backend, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))


def interrupt(cluster, monkeypatch, error: BaseException) -> None:
    def sleep(_seconds):
        if not (cluster.here / "cancelled").exists():
            raise error

    cluster.say("PENDING")
    replace_sleep(monkeypatch, sleep)


def test_ctrl_c_cancels_the_job_and_kills_the_run(cluster, client, monkeypatch):
    interrupt(cluster, monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        send()
    (run,) = all_runs(client)
    assert (run.info.status, run.data.tags["slurm.state"]) == ("KILLED", "CANCELLED")


CLOSED = Terminated("SIGHUP")


@pytest.mark.parametrize(("error", "how"), [(KeyboardInterrupt(), "leave"), (CLOSED, "leave"), (CLOSED, "cancel")])
def test_the_job_goes_on_where_the_config_says_so_or_the_terminal_is_closed(cluster, client, monkeypatch, error, how):
    interrupt(cluster, monkeypatch, error)
    with pytest.raises(KeyboardInterrupt):
        send(on_interrupt=how)
    assert not (cluster.here / "cancelled").exists()
    (run,) = all_runs(client)
    assert (run.info.status, run.data.tags["slurm.state"]) == ("SCHEDULED", "PENDING")


def test_a_controller_that_goes_away_ends_no_wait(cluster, client, monkeypatch, capfd):
    looks = []

    def sleep(_seconds):
        looks.append((cluster.here / "away").exists())
        if len(looks) == 1:
            (cluster.here / "away").touch()
        elif len(looks) == 3:
            (cluster.here / "away").unlink()
            cluster.say("COMPLETED")

    cluster.say("RUNNING")
    replace_sleep(monkeypatch, sleep)
    assert client.get_run(send().run_id).info.status == "FINISHED"
    assert looks == [False, True, True]
    assert capfd.readouterr().err.count("controller is away") == 1


def test_the_next_command_reads_the_jobs_of_this_cluster_alone(cluster, client, monkeypatch):
    cluster.say("PENDING")
    ours, elsewhere, waits = (send(wait=False).run_id for _ in range(3))
    client.set_tag(elsewhere, "slurm.cluster", "two")
    monkeypatch.setattr(jobs, "waiting_runs", lambda: [waits])

    def states():
        return [client.get_run(run_id).info.status for run_id in (ours, elsewhere, waits)]

    # all submissions have the same number here: the comment says which run a job belongs to
    (cluster.here / "comment").write_text(ours)
    jobs.settle_jobs(client)
    assert states() == ["SCHEDULED"] * 3
    (cluster.here / "away").touch()
    cluster.say("TIMEOUT")
    jobs.settle_jobs(client)
    assert states() == ["SCHEDULED"] * 3
    (cluster.here / "away").unlink()
    jobs.settle_jobs(client)
    assert states() == ["KILLED", "SCHEDULED", "SCHEDULED"]
    assert client.get_run(ours).data.tags["slurm.state"] == "TIMEOUT"
    # the run's records were sent, and its number now belongs to another job
    monkeypatch.setattr(jobs, "waiting_runs", lambda: [])
    jobs.settle_jobs(client)
    assert states() == ["KILLED", "SCHEDULED", "KILLED"]
    assert client.get_run(waits).data.tags["slurm.state"] == "GONE"


def test_a_run_whose_job_slurm_begins_again_waits_again(cluster, client):
    cluster.say("PENDING")
    run_id = send(wait=False).run_id
    client.set_terminated(run_id, "KILLED")
    jobs.settle_jobs(client)
    assert client.get_run(run_id).info.status == "SCHEDULED"


def test_a_dead_process_ends_no_run_whose_job_may_begin_again(client, monkeypatch):
    from dp_lora.tracking import process

    job, plain = made_run(client), made_run(client)
    client.set_tag(job, "slurm.job", "7")
    monkeypatch.setattr(process, "has_died", lambda tags: True)
    for run_id in (job, plain):
        client.set_tag(run_id, "host", process.process_tags()["host"])
    assert process.close_orphans(client) == [plain]


def in_job(monkeypatch, of: str | None) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "one")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    if of is None:
        monkeypatch.delenv("DPLORA_JOB_OF", raising=False)
    else:
        monkeypatch.setenv("DPLORA_JOB_OF", of)


TOLD = {"slurm.job": "9", "slurm.cluster": "one", "slurm.state": "RUNNING", "slurm.restarts": "2", "slurm.job_of": "r"}


def test_a_job_of_ours_tells_its_own_number_and_somebody_s_own_script_tells_none(monkeypatch):
    in_job(monkeypatch, "r")
    assert jobs.own_job_tags() == TOLD
    in_job(monkeypatch, None)
    assert jobs.own_job_tags() == {}


@pytest.fixture
def lost(cluster, client, monkeypatch):
    """A run that a member of a study opened in its task, on a machine that is gone."""
    study = made_run(client)
    in_job(monkeypatch, study)
    monkeypatch.setenv("MLFLOW_RUN_ID", study)
    run = opening._opened(client, "main", load("mnist5k"), child=True)
    for name in ("MLFLOW_RUN_ID", "DPLORA_JOB_OF", "SLURM_JOB_ID"):
        monkeypatch.delenv(name)
    client.set_tag(run.info.run_id, "host", "elsewhere")
    (cluster.here / "comment").write_text(study)
    return run.info.run_id


@pytest.mark.parametrize(
    ("state", "code", "says"),
    [
        ("OUT_OF_MEMORY", "0:125", "Slurm: out of memory (OUT_OF_MEMORY)"),
        ("NODE_FAIL", "1:0", "Slurm: its node failed (NODE_FAIL)"),
        # another member of the task failed later, or none did: the run itself never closed
        ("FAILED", "1:0", "its process was killed in the job, which then went on to its end"),
        ("COMPLETED", "0:0", "its process was killed in the job, which then went on to its end"),
        ("PENDING", "0:0", "Slurm began its job again"),
    ],
)
def test_a_member_that_was_killed_in_its_task_is_ended_by_the_next_command(cluster, client, lost, state, code, says):
    from dp_lora.tracking import process

    assert client.get_run(lost).data.tags["slurm.job"] == "9"
    cluster.restarts(2)
    cluster.say("RUNNING")
    jobs.settle_jobs(client)
    assert process.close_orphans(client) == []
    assert client.get_run(lost).info.status == "RUNNING"
    cluster.say(state, code)
    jobs.settle_jobs(client)
    run = client.get_run(lost)
    assert (run.info.status, run.data.tags["error"]) == ("KILLED", says)
    assert not run.data.tags["slurm.state"].endswith("ING")


def test_a_member_whose_job_has_begun_again_is_ended_and_one_that_ended_itself_stays_so(cluster, client, lost):
    cluster.restarts(3)
    cluster.say("RUNNING")
    client.set_terminated(lost, "FINISHED")
    jobs.settle_jobs(client)
    run = client.get_run(lost)
    assert (run.info.status, run.data.tags.get("error")) == ("FINISHED", None)
    client.update_run(lost, status="RUNNING")
    client.set_tag(lost, "slurm.state", "RUNNING")
    jobs.settle_jobs(client)
    assert client.get_run(lost).info.status == "KILLED"


def test_the_experiment_says_how_many_ranks_there_are(monkeypatch):
    from dp_lora.config import STAGES

    monkeypatch.setattr(slurm_backend, "STAGES", STAGES)
    settings = Settings(Environment("venv", "/venv"), gpus="a100:2")

    def ranks(entry, overrides="", config="mnist5k"):
        return slurm_backend._ranks(entry, {"config": config, "eps": "5", "overrides": overrides}, settings)

    assert ranks("finetune") == Ranks(1, 1)
    assert ranks("finetune", "compute.devices=2 compute.num_nodes=3") == Ranks(2, 3)
    assert ranks("main", "compute.devices=2") == Ranks()  # its stages start their ranks themselves
    assert ranks("nobody's") == Ranks()
    with pytest.raises(InputError, match="main works on one machine; send finetune and sample apart"):
        ranks("main", "compute.num_nodes=2")
    with pytest.raises(InputError, match=r"compute.devices=4, .*asks for 2 GPUs a machine"):
        ranks("finetune", "compute.devices=4")
    assert ranks("finetune", "compute.devices=4 compute.device=cpu") == Ranks(4)
    with pytest.raises(InputError, match="did you mean mnist5k"):
        ranks("finetune", config="mnist6k")
