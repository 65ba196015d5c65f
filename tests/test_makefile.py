"""`make setup` on a machine that lacks something: one line that says what, and nothing made."""

import shutil
import subprocess

import pytest

from dp_lora.config import ROOT

SOUND = {"uname": "echo Linux x86_64", "git": "true", "python3": "true"}  # what a complete machine says


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
    tools.mkdir()
    for name, script in (SOUND | lacks).items():
        if script is not None:
            (tools / name).write_text(f"#!/bin/sh\n{script}\n")
            (tools / name).chmod(0o755)
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
