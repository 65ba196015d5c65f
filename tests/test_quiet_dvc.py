"""DVC as our commands start it, on a small pipeline: it gives no advice to push, and one line if a stage fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dp_lora.config import ROOT

PIPELINE = """
stages:
  good: {cmd: entrypoints/run 0, always_changed: true}
  refuses: {cmd: entrypoints/run 1}
  dies: {cmd: entrypoints/run 9}
  makes: {cmd: echo made > made && entrypoints/run 0, outs: [made]}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    (tmp_path / "dvc.yaml").write_text(PIPELINE)
    (tmp_path / "entrypoints").mkdir()
    script = tmp_path / "entrypoints/run"
    script.write_text('#!/bin/sh\n[ $1 != 1 ] || echo "error: the stage\'s own line" >&2\nexit $1\n')
    script.chmod(0o755)
    return tmp_path


def repro(project: Path, stage: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dp_lora.cli.quiet_dvc", "repro", stage]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("stage", "status", "lines"),
    [
        ("good", 0, []),
        ("refuses", 255, ["error: the stage's own line"]),
        ("dies", 255, ["ERROR: failed to reproduce 'dies': failed to run: entrypoints/run 9, exited with 9"]),
        ("unknown", 255, ["ERROR: Stage 'unknown' not found inside 'dvc.yaml' file"]),
    ],
)
def test_dvc_says_once_what_fails_and_never_to_push_private_data(project, stage, status, lines):
    done = repro(project, stage)
    assert (done.returncode, done.stderr.splitlines()) == (status, lines)
    assert "push" not in done.stdout
    assert ("Running stage" in done.stdout) is (stage != "unknown")


def test_dvc_goes_on_after_a_killed_command_without_a_word_of_its_locks(project):
    ended = subprocess.Popen(["true"])
    ended.wait()
    (project / ".dvc/tmp").mkdir()
    lock = project / ".dvc/tmp/rwlock"
    lock.write_text(json.dumps({"write": {str(project / "made"): {"pid": ended.pid, "cmd": "a killed one"}}}))
    done = repro(project, "makes")
    assert (done.returncode, done.stderr) == (0, "")
    assert "a killed one" not in lock.read_text()
    assert (project / "made").exists()


def test_dvc_does_not_advise_to_commit_the_hashes_of_private_data(project):
    subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)
    (project / ".dvc/config").write_text("[core]\n    analytics = false\n")
    done = repro(project, "makes")
    assert done.returncode == 0, done.stderr
    assert (project / "dvc.lock").exists()
    assert "git add" not in done.stdout + done.stderr
