"""`mlflow run . -b slurm` on a real cluster of one node, as `make test-slurm` starts it."""

import json
import os
import re
import signal
import subprocess

import pytest

from tests.support.slurm_site import PATIENCE, Site
from tests.support.study_runs import assert_smoke_is_done
from tests.support.tracking_store import all_runs

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3600)]
LATER = ["--begin=now+3600"]  # a job that waits, and costs nothing
LONG = "privacy.epochs=20000"  # as many steps as no test waits for
TAIL = 3000


def finished(site: Site, done: subprocess.CompletedProcess[str]):
    """The newest run, which has FINISHED."""
    run = site.last()
    assert done.returncode == 0, done.stderr[-TAIL:] + site.log(run.info.run_id)[-TAIL:]
    assert run.info.status == "FINISHED"
    assert "error" not in run.data.tags
    assert run.data.tags["slurm.state"] == "COMPLETED"
    return run


def job_of(site: Site, run_id: str) -> str:
    return site.get(run_id).data.tags["slurm.job"]


def begun(site: Site, overrides: str, steps: int, **config):
    """A `mlflow run` that waits for its job, as soon as its ledger has some steps; the process and the run's id."""
    before = site.newest()
    process = site.start("finetune", overrides, **config)
    run_id = site.sent(before)
    site.until(lambda: process.poll() is not None or site.steps(run_id) >= steps, "steps are taken")
    assert process.poll() is None, process.communicate()[0][-TAIL:]
    return process, run_id


@pytest.fixture(scope="module")
def fine_tuned(site):
    """A run of one process."""
    return finished(site, site.run("finetune"))


def test_finetune_sample_and_fid_are_jobs_that_hand_over_by_run_id(site, fine_tuned):
    assert 0 < fine_tuned.data.metrics["epsilon"] <= 10
    names = {file.path for file in site.client.list_artifacts(fine_tuned.info.run_id, "slurm")}
    assert names == {"slurm/job.sh"}
    script = site.client.download_artifacts(fine_tuned.info.run_id, "slurm/job.sh")
    with open(script, encoding="utf-8") as file:
        text = file.read()
    assert "#SBATCH --partition=debug" in text
    assert "sqlite" not in text  # nor any other address of a store
    sampled = finished(site, site.run("sample", parameters={"adapter": fine_tuned.info.run_id}))
    more = "evaluation.classifier_steps=20 evaluation.min_images=4 evaluation.public_reference=null"
    scored = finished(site, site.run("fid", more, {"samples": sampled.info.run_id}))
    assert "letter_frechet_distance" in scored.data.metrics


def test_two_ranks_by_srun_spend_the_epsilon_of_one(site, fine_tuned):
    both = finished(site, site.run("finetune", "compute.devices=2"))
    assert both.data.metrics["epsilon"] == fine_tuned.data.metrics["epsilon"]
    assert site.steps(both.info.run_id) == site.steps(fine_tuned.info.run_id) > 0
    release = site.project / both.data.tags["adapter"]
    assert (release / "pytorch_lora_weights.safetensors").exists()


def test_a_job_that_is_signalled_before_its_limit_begins_again_and_ends_in_the_same_run_and_ledger(site):
    process, run_id = begun(site, "privacy.epochs=8", 3)
    job = job_of(site, run_id)
    # what Slurm itself sends by --signal=B:USR1
    site.node.ask("scancel", "--signal=USR1", "--batch", job)
    told, _ = process.communicate(timeout=PATIENCE)
    log = site.log(run_id)
    assert process.returncode == 0, told[-TAIL:] + log[-TAIL:]
    run = site.get(run_id)
    assert run.info.status == "FINISHED"
    assert (run.data.tags["slurm.job"], run.data.tags["slurm.restarts"]) == (job, "1")
    assert "error" not in run.data.tags
    assert "stopped (SIGUSR1); it goes on in the same run" in log
    # no checkpoint was due: the one that the signal made has every step that the ledger counts
    (line,) = [line for line in log.splitlines() if line.startswith("going on after step ")]
    step, counted = line.partition(";")[0].split()[-1], line.split("holds ")[1].split()[0]
    assert int(counted) - int(step) <= 1
    assert int(step) >= 3
    assert site.steps(run_id) <= 40
    assert 0 < run.data.metrics["epsilon"] <= 10
    assert "private/loss" in run.data.tags["private"].split(", ")


def limit(site: Site, job: str, minutes: int) -> None:
    """Set the time limit of a job; of one that runs, counted from now."""
    shown = site.node.ask("scontrol", "--oneliner", "show", "job", job)
    hours, passed, _ = re.search(r" RunTime=(\d+):(\d+):(\d+)", shown).groups()
    command = ["scontrol", "update", f"JobId={job}", f"TimeLimit={60 * int(hours) + int(passed) + minutes}"]
    subprocess.run(command, env=site.environment(), check=True, timeout=60)


def test_a_time_limit_begins_the_job_again_and_ctrl_c_cancels_it(site):
    process, run_id = begun(site, LONG, 3, time="4:00:00", signal=150)
    job = job_of(site, run_id)
    # the signal is due at once, and the work has minutes to end
    limit(site, job, 3)
    site.until(lambda: "it goes on in the same run" in site.log(run_id), "the signal is heard")
    steps = site.steps(run_id)
    site.until(lambda: "JobState=PENDING" in site.node.ask("scontrol", "show", "job", job), "the job waits again")
    limit(site, job, 240)
    assert site.get(run_id).info.status == "SCHEDULED"
    site.until(lambda: site.steps(run_id) > steps, "the job goes on")
    assert site.get(run_id).info.status == "RUNNING"
    os.killpg(process.pid, signal.SIGINT)
    told, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, told
    run = site.get(run_id)
    assert (run.info.status, run.data.tags["slurm.state"]) == ("KILLED", "CANCELLED"), told
    assert run.data.tags["slurm.restarts"] == "1"
    assert job not in site.node.jobs()


def test_a_time_limit_without_requeue_ends_the_run_and_names_it(site):
    done = site.run("finetune", LONG, time="1", signal=30, requeue=False)
    run = site.last()
    assert done.returncode == 1
    assert (run.info.status, run.data.tags["slurm.state"]) == ("KILLED", "TIMEOUT"), site.log(run.info.run_id)[-TAIL:]


def test_a_login_node_that_goes_away_loses_nothing_for_the_next_command_reads_the_job(site):
    # with wait=true: the terminal is closed; the job goes on to wait
    before = site.newest()
    process = site.start("count_params", extra=LATER)
    closed = site.sent(before)
    os.killpg(process.pid, signal.SIGHUP)
    assert "goes on" in process.communicate(timeout=PATIENCE)[0]
    # on_interrupt=leave
    process = site.start("count_params", extra=LATER, on_interrupt="leave")
    left = site.sent(closed)
    os.killpg(process.pid, signal.SIGINT)
    assert f"scancel {job_of(site, left)}" in process.communicate(timeout=PATIENCE)[0]
    # wait=false
    done = site.run("count_params", extra=LATER, wait=False)
    assert done.returncode == 0, done.stderr[-TAIL:]
    gone = site.newest()
    for run_id in (closed, left, gone):
        assert site.get(run_id).info.status == "SCHEDULED"
        assert job_of(site, run_id) in site.node.jobs()
    for run_id in (closed, gone):
        site.node.ask("scancel", job_of(site, run_id))
    counted = site.ours("count_params", "--config", "digits-tiny")
    assert counted.returncode == 0, counted.stderr[-TAIL:]
    for run_id in (closed, gone):
        run = site.get(run_id)
        assert (run.info.status, run.data.tags["slurm.state"]) == ("KILLED", "CANCELLED")
        assert run.data.tags["error"] == "Slurm: cancelled (CANCELLED)"
    assert site.get(left).info.status == "SCHEDULED"
    site.node.ask("scancel", job_of(site, left))


def test_a_study_is_an_array_whose_members_are_each_made_once(site):
    config = site.project.parent / "array.json"
    config.write_text(json.dumps({"partition": "debug", "cpus": 1}), encoding="utf-8")
    words = ["study", "--study", "smoke", "--jobs", "2", "--overrides", "compute.device=cpu", "--slurm", str(config)]
    done = site.ours(*words)
    logs = site.project / "runs/studies/smoke/logs"
    said = "".join(path.read_text(encoding="utf-8")[-TAIL:] for path in sorted(logs.glob("*.txt")))
    assert done.returncode == 0, done.stderr[-TAIL:] + said
    assert "3 of 3 members are done" in done.stdout
    assert_smoke_is_done(site.project, site.client)
    tasks = [run for run in all_runs(site.client) if run.data.tags.get("stage") == "main"]
    assert all({"slurm.job", "slurm.cluster"} <= {*run.data.tags} for run in tasks)
    script = (site.project / "runs/studies/smoke/slurm/members/job.sh").read_text(encoding="utf-8")
    assert "#SBATCH --array=0-2%2" in script
    again = site.ours(*words)
    assert "3 of 3 members are done already" in again.stdout


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What a user reads at the end, and no traceback."""
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return [line for line in done.stderr.splitlines() if "ERROR" in line]


def test_a_wrong_partition_ends_the_run_in_one_line(site):
    (line,) = errors(site.run("count_params", partition="gpus"))
    assert "sbatch: " in line
    assert "invalid partition specified: gpus" in line
    run = site.last()
    assert run.info.status == "FAILED"
    assert "invalid partition specified: gpus" in run.data.tags["error"]


def test_a_controller_that_is_away_is_one_line_and_no_run(site):
    before = site.newest()
    site.node.stop_controller()
    try:
        (line,) = errors(site.run("count_params"))
    finally:
        site.node.start_controller()
    assert "Slurm's controller is away" in line
    assert site.newest() == before
