"""Studies by the real command lines: killed or stopped by Ctrl-C they go on, and a failed member stops no other one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from dp_lora.config import ROOT
from dp_lora.tracking.store import sqlite_uri
from tests.support.prepare_call import clone
from tests.support.study_runs import assert_smoke_is_done, finetunings, member_records
from tests.support.tiny_project import clean_environment, run

pytestmark = pytest.mark.slow

COMMAND = ("dp_lora", "study", "--study", "smoke", "--jobs", "2", "--overrides", "compute.device=cpu")
VALUES = ("study=smoke", "jobs=2", "overrides=compute.device=cpu")
BY_MLFLOW = ("mlflow", "run", ".", "-b", "native", "-e", "study", *(word for value in VALUES for word in ("-P", value)))
MEMBERS = 3


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return clone(ROOT, tmp_path_factory.mktemp("study") / "project")


def at_work(project: Path) -> list[psutil.Process]:
    """Processes whose current folder is the project."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(project) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def stop_when(project: Path, command: Sequence[str], number: int, reached: Callable[[], bool]) -> tuple[int, str]:
    """Start a study, send it a signal when `reached`, and check that its processes are gone a moment after its end.

    Gives its exit status and what it printed.
    """
    environment = {**clean_environment(), "DPLORA_PYTHON": sys.executable, "DVC_NO_ANALYTICS": "1"}
    path = project.parent / "output.txt"
    with path.open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=project, env=environment, stdout=output, stderr=output
        )
        while not reached():
            assert child.poll() is None, path.read_text()[-3000:]
            time.sleep(0.1)
        os.kill(child.pid, number)
        status = child.wait()
    end = time.monotonic() + 10
    while at_work(project) and time.monotonic() < end:
        time.sleep(0.1)
    assert at_work(project) == []
    return status, path.read_text()


def test_a_study_that_is_killed_twice_goes_on_and_every_member_is_done_once(project):
    # kill it once while DVC makes the upstream stages, once while one member samples and another works
    stop_when(project, COMMAND, signal.SIGKILL, (project / "outputs/letters/data").is_dir)
    stop_when(project, COMMAND, signal.SIGKILL, lambda: bool(finetunings(project)))
    kept = finetunings(project)
    assert kept

    done = run(project, *BY_MLFLOW)  # the other command line of the same study
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert f"{MEMBERS} of {MEMBERS} members are done\n" in done.stdout
    assert "accuracy" not in done.stdout + done.stderr  # scores are for a terminal alone
    finished = member_records(project)
    assert kept <= finetunings(project)  # no finished fine-tuning ran again
    assert_smoke_is_done(project, MlflowClient(sqlite_uri(project / "mlflow.db")))
    # each private fine-tuning has one ledger with all its steps
    ledgers = list((project / "runs").glob("*/ledger.jsonl"))
    for path in ledgers:
        steps = json.loads((path.parent / "plan.json").read_text())["plan"]["steps"]
        lines = [json.loads(line)["entry"] for line in path.read_text().splitlines()]
        assert {line["step"] for line in lines} == set(range(steps))
    assert len(ledgers) >= 2

    again = run(project, *COMMAND)
    assert again.returncode == 0, again.stderr[-2000:]
    assert f"{MEMBERS} of {MEMBERS} members are done already\n" in again.stdout
    assert member_records(project) == finished


BROKEN = """
title: one of two members cannot be scored
config: smoke
settings: {eps: inf, compute.device: cpu}
groups:
  - {name: weights, grid: {evaluation.inception_weights: [nowhere.pt]}}
  - {name: seed, seeds: [1]}
"""


BROKEN_COMMAND = ("dp_lora", "study", "--study", "broken", "--jobs", "2")


def test_ctrl_c_ends_the_members_and_says_how_to_go_on_then_a_member_that_fails_stops_no_other_one(project):
    (project / "configs/studies/broken.yaml").write_text(BROKEN, encoding="utf-8")
    status, printed = stop_when(project, BROKEN_COMMAND, signal.SIGINT, lambda: bool(finetunings(project, "broken")))
    assert status == 130
    lines = [line for line in printed.splitlines() if line.startswith(("error: ", "Traceback"))]
    assert lines == ["error: stopped (Ctrl-C); the same command goes on"]
    kept = finetunings(project, "broken")
    assert kept

    # a second call goes on; a third one tries the failed member again
    for _ in range(2):
        done = run(project, *BROKEN_COMMAND)
        assert done.returncode == 1, done.stderr[-2000:]
        assert "1 of 2 members are done\n" in done.stdout
        (line,) = [line for line in done.stderr.splitlines() if ": failed: " in line]
        assert "evaluation.inception_weights=nowhere.pt seed=0: failed: fid: evaluation.inception_weights=" in line
        report = (project / "runs/studies/broken/report/report.md").read_text(encoding="utf-8").replace("\\", "")
        assert "nowhere.pt seed=0" in report.partition("| failed | fid: ")[0].splitlines()[-1]
    assert "1 of 2 members are done already\n" in done.stdout
    assert kept <= finetunings(project, "broken")
