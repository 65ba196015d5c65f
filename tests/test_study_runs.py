"""study=smoke by the real command line: killed with -9 twice, it goes on, and ends with every member done once."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dp_lora.config import ROOT
from tests.support.prepare_call import clone, commit_all
from tests.support.tiny_project import clean_environment, run
from tests.support.tracking_store import all_runs

pytestmark = pytest.mark.slow

COMMAND = ("dp_lora", "study", "--study", "smoke", "--jobs", "2", "--overrides", "compute.device=cpu")
MEMBERS = 3


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = clone(ROOT, tmp_path_factory.mktemp("study") / "project")
    commit_all(folder)
    return folder


def records(project: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in (project / "runs/studies/smoke").glob("*/member.json")]


def at_work(project: Path) -> list[psutil.Process]:
    """Processes that work in the project."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(project) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def kill_when(project: Path, reached: Callable[[], bool]) -> None:
    """Start the study, and end it by SIGKILL when `reached`; all that it had started is gone a moment later."""
    environment = {**clean_environment(), "DPLORA_PYTHON": sys.executable, "DVC_NO_ANALYTICS": "1"}
    with (project.parent / "output.txt").open("ab") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", *COMMAND], cwd=project, env=environment, stdout=output, stderr=output
        )
        while not reached():
            assert child.poll() is None, (project.parent / "output.txt").read_text()[-3000:]
            time.sleep(0.1)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    end = time.monotonic() + 10
    while at_work(project) and time.monotonic() < end:
        time.sleep(0.1)
    assert at_work(project) == []


def test_a_study_that_is_killed_twice_goes_on_and_every_member_is_done_once(project):
    kill_when(project, lambda: bool(records(project)))  # while the first stages of its members run
    before = [record for record in records(project) if record["seconds"]]
    kill_when(project, lambda: len([one for one in records(project) if "finetune" in one["seconds"]]) > len(before))
    kept = {one["runs"]["finetune"] for one in records(project) if "finetune" in one["seconds"]}
    assert kept

    done = run(project, *COMMAND)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert f"{MEMBERS} of {MEMBERS} members are done\n" in done.stdout
    assert "accuracy" not in done.stdout + done.stderr  # scores are for a terminal alone
    finished = records(project)
    assert len(finished) == MEMBERS
    assert all({"finetune", "sample", "fid"} <= set(record["seconds"]) for record in finished)
    assert sum("audit" in record["seconds"] for record in finished) == 1
    assert kept <= {record["runs"]["finetune"] for record in finished}  # what was done was not done again

    runs = [
        found for found in all_runs(project / "mlflow.db") if "study" in found.data.tags or found.data.tags.get("stage")
    ]
    ended = [found for found in runs if found.info.status == "FINISHED"]
    members = [found for found in ended if found.data.tags["stage"] == "main"]
    assert sorted(found.data.tags["mlflow.runName"] for found in members) == [
        "smoke: eps=10 seed=0", "smoke: eps=5 k=2 seed=0", "smoke: eps=inf seed=0"
    ]  # fmt: skip
    (whole,) = [found for found in ended if found.data.tags["stage"] == "study"]
    assert {found.data.tags["mlflow.parentRunId"] for found in members} == {whole.info.run_id}
    assert not [found for found in runs if found.info.status == "RUNNING"]
    # every step of the private members stands in a ledger once, and no step was taken twice
    for path in (project / "runs").glob("*/plan.json"):
        steps = json.loads(path.read_text())["plan"]["steps"]
        lines = [json.loads(line) for line in (path.parent / "ledger.jsonl").read_text().splitlines()]
        assert len({line["step"] for line in lines if "step" in line}) == steps

    again = run(project, *COMMAND)
    assert again.returncode == 0, again.stderr[-2000:]
    assert f"{MEMBERS} of {MEMBERS} members are done already\n" in again.stdout
    assert records(project) == finished
