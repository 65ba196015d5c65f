"""Ctrl-C and SIGTERM end a command with one line that says how to go on, and leave no process behind."""

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from dp_lora.cli.common import Call, entry_point, one_line_errors
from dp_lora.config import ROOT
from dp_lora.tracking import Terminated


@pytest.mark.parametrize(("error", "word"), [(KeyboardInterrupt(), "Ctrl-C"), (Terminated("SIGTERM"), "SIGTERM")])
def test_a_stopped_command_says_by_what_and_how_to_go_on(error, word, capsys, monkeypatch):
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise error
    assert ended.value.code == 130
    assert capsys.readouterr().err == f"error: stopped ({word}); the same command goes on\n"


@pytest.mark.parametrize("begun", [False, True])
def test_a_fine_tuning_that_mlflow_run_started_names_the_command_that_goes_on_with_its_ledger(
    begun, tmp_path, monkeypatch
):
    run_id = "a" * 32
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    monkeypatch.setattr("dp_lora.cli.record.RUNS", tmp_path)
    monkeypatch.setattr("dp_lora.tracking.fail_joined_run", lambda message, child: None)

    @entry_point("finetune")
    def stopped(call: Call) -> None:
        if begun:
            (tmp_path / "operator" / run_id).mkdir(parents=True)
            (tmp_path / "operator" / run_id / "ledger.json").touch()
        raise Terminated("SIGTERM")

    result = CliRunner().invoke(stopped, ["--eps", "5", "--overrides", "compute.device=cpu"])
    assert result.exit_code == 130
    line, how = result.stderr.strip().split("; ")
    assert line == "error: stopped (SIGTERM)"
    if not begun:
        assert how == "the same command goes on"
        return
    words = shlex.split(how.removeprefix("to go on, type: "))
    assert words[:7] == [".venv/bin/mlflow", "run", ".", "-b", "native", "-e", "finetune"]
    assert {"config=mnist5k", "eps=5.0"} <= {*words}
    assert {f"train.resume={run_id}", "compute.device=cpu"} == {*words[-1].removeprefix("overrides=").split()}


# a `make reproduce` whose interpreter starts a child and waits for it
REPRODUCE = """
import sys
from pathlib import Path
from dp_lora.config import load
from dp_lora.cli import remaking
from dp_lora.commands import reproduce
place, fake = map(Path, sys.argv[1:])
tree = place / "reproduce/RUN/tree"
def git(*arguments, check=True):
    tree.mkdir(parents=True)
    (tree / "params.yaml").write_text("config: null")
reproduce.RUNS, reproduce.git = place, git
remaking._python = lambda recorded, tree: str(fake)
reproduce.read_recorded = lambda run_id, place: reproduce.Recorded(
    run_id, "main", "", "", load("mnist5k"), {}, place, None
)
reproduce.main(["RUN"])
"""
FAKE = """#!/bin/sh
sleep 600 &
echo $! > {place}/pid.new
mv {place}/pid.new {place}/pid
wait
"""


def lives(pid: int) -> bool:
    """Whether a process runs; a zombie, which init has not yet reaped, counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_make_reproduce_leaves_no_child_and_says_what_to_remove(number, tmp_path):
    fake = tmp_path / "python"
    fake.write_text(FAKE.format(place=tmp_path))
    fake.chmod(0o755)
    command = [sys.executable, "-c", REPRODUCE, str(tmp_path), str(fake)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    pid = tmp_path / "pid"
    while not pid.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    _, told = process.communicate(timeout=120)
    assert not lives(int(pid.read_text()))
    assert process.returncode == 130
    line = told.splitlines()[-1]
    assert line.startswith("error: stopped (")
    assert "git worktree remove --force" in line
    assert line.endswith("then type the same command again")
