"""`make` on a machine that lacks something prints one line that says what is missing, and makes nothing."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dp_lora.config import ROOT
from tests.gpu.gather import PACKAGES, pinned

SOUND = {"uname": "echo Linux x86_64", "git": "true", "python3": "true"}  # a complete machine


def stand_in(folder: Path, name: str, script: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("lacks", "says"),
    [
        ({"uname": "echo Darwin arm64"}, "error: Linux on x86-64 is needed, this is Darwin arm64"),
        ({"git": None}, "error: git is missing; install it (Debian: apt-get install git)"),
        ({"python3": None}, "error: python3 is missing; install Python 3.11 to 3.13"),
        (
            {"python3": 'case "$*" in -V) echo Python 3.9.2;; *version_info*) exit 1;; esac'},
            "error: python3 is Python 3.9.2; Python 3.11 to 3.13 is needed: make setup PYTHON=python3.11",
        ),
        (
            {"python3": 'case "$*" in *ensurepip*) exit 1;; esac'},
            "error: Python's venv is missing; install it (Debian: apt-get install python3-venv)",
        ),
    ],
)
@pytest.mark.parametrize("command", ["setup", "quickstart"])
def test_a_machine_that_lacks_something_is_told_what_in_one_line(tmp_path, command, lacks, says):
    tools = tmp_path / "bin"
    for name, script in (SOUND | lacks).items():
        if script is not None:
            stand_in(tools, name, script)
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copyfile(ROOT / name, tree / name)
    make = shutil.which("make")
    done = subprocess.run(
        [make, command], cwd=tree, env={"PATH": str(tools)}, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if not line.startswith("make: ***")] == [says]
    assert not (tree / ".venv").exists()


def test_setup_says_what_it_does_once_and_makes_the_environment_of_a_moved_project_anew(tmp_path):
    tools = tmp_path / "bin"
    for name, script in SOUND.items():
        stand_in(tools, name, script)
    venv = "rm -rf .venv; mkdir -p .venv/bin; cp /bin/true .venv/bin/python"
    stand_in(tools, "python3", f'case "$*" in -V) echo Python 3.12.1;; "-m venv"*) {venv};; esac')
    stand_in(tools, "uv", "true")
    tree = tmp_path / "first place"
    tree.mkdir()
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copyfile(ROOT / name, tree / name)

    def setup(tree: Path) -> list[str]:
        environment = {"PATH": f"{tools}:{os.defpath}"}
        done = subprocess.run(["make", "setup"], cwd=tree, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()

    first = setup(tree)
    assert first[0].startswith(".venv: an environment of Python 3.12.1, from the 2")
    assert "downloading and installing" in first[1]
    assert first[2:] == [".venv: complete"]
    assert setup(tree) == ["make: Nothing to be done for 'setup'."]
    tree.rename(tmp_path / "moved")
    told = setup(tmp_path / "moved")
    assert told[0] == f"the project was moved here from {tree}: its environment is made anew"
    assert told[1:] == first
    assert setup(tmp_path / "moved") == ["make: Nothing to be done for 'setup'."]
    (tmp_path / "moved/.venv").rename(tmp_path / "shared")
    (tmp_path / "moved/.venv").symlink_to(tmp_path / "shared")
    (tmp_path / "shared/.complete").write_text("/elsewhere\n")  # a linked one is no moved one
    assert setup(tmp_path / "moved") == ["make: Nothing to be done for 'setup'."]


def test_uv_waits_minutes_for_a_slow_network_in_every_target_and_in_the_image():
    shown = ["make", "--silent", "--eval", "show:; @echo $$UV_HTTP_TIMEOUT", "show"]

    def seconds(**given: str) -> str:
        environment = {"PATH": os.environ["PATH"], **given}
        return subprocess.run(shown, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout

    assert seconds() == "300\n"
    assert seconds(UV_HTTP_TIMEOUT="900") == "900\n"
    (step,) = re.findall(r"^RUN (?:.*\\\n)*.*uv pip sync", (ROOT / "docker/Dockerfile").read_text(), flags=re.MULTILINE)
    assert "export XDG_CACHE_HOME=/var/cache/dp-lora UV_HTTP_TIMEOUT=300;" in step


def test_the_wheels_for_a_gpu_machine_are_those_of_the_lock_each_with_its_hashes():
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    entries = pinned(lock, PACKAGES)
    assert re.findall(r"^([a-z0-9.\-]+)==[0-9]", entries, flags=re.MULTILINE) == list(PACKAGES)
    for entry in re.split(r"^(?=\S)", entries, flags=re.MULTILINE)[1:]:
        assert entry in lock
        assert "--hash=sha256:" in entry


@pytest.mark.slow
def test_the_tests_of_the_gpu_fail_in_one_line_where_there_is_none_and_skip_nothing():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (summary, said) = [line for line in done.stdout.splitlines() if line.strip()]
    assert "no tests ran" in summary
    assert "PyTorch sees no GPU here" in said
