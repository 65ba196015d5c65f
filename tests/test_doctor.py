"""`python -m dp_lora.doctor` prints one line per check, says what to do about each fault, and shows no traceback."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dp_lora import doctor
from dp_lora.config import ROOT


def program(folder: Path, name: str, script: str) -> None:
    """A stand-in for a program that this machine may not have."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    (folder / name).chmod(0o755)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_every_check_is_one_line_and_the_status_says_whether_something_is_wrong(tmp_path):
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"http://me:secret@127.0.0.1:{closed_port()}"}
    command = [sys.executable, "-m", "dp_lora.doctor"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert [line[6:21].strip() for line in lines] == list(doctor.CHECKS)
    assert all(re.match(r"(ok|note|wrong) +\w", line) for line in lines)
    assert done.returncode == 1
    (store,) = (line for line in lines if "tracking store" in line)
    assert store.startswith("wrong tracking store")
    assert "no server is there; start it" in store
    assert "secret" not in done.stdout + done.stderr
    assert done.stderr == ""


def test_it_imports_neither_torch_nor_mlflow():
    code = "import sys, dp_lora.doctor as d; d.main(); sys.exit('torch' in sys.modules or 'mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_without_the_environment_it_says_make_setup_and_shows_no_traceback():
    # -S: no site-packages, as in a Python without any installed package
    done = subprocess.run(
        [sys.executable, "-S", "-m", "dp_lora.doctor"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == len(doctor.CHECKS)
    assert re.search(r"^wrong packages .*torch missing, not .*make setup", done.stdout, re.MULTILINE)
    assert "Traceback" not in done.stdout + done.stderr


def test_an_error_in_a_check_is_a_finding():
    def broken():
        raise PermissionError(13, "Permission denied", "/x")

    found = doctor.examine(broken)
    assert found == ("wrong", "could not be looked at: PermissionError: [Errno 13] Permission denied: '/x'")


def test_a_gpu_is_named_and_a_broken_driver_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    program(tmp_path, "nvidia-smi", "echo 'NVIDIA H100, 560.1, 81559 MiB'; echo 'NVIDIA H100, 560.1, 81559 MiB'")
    assert doctor.gpu() == ("ok", "2 x NVIDIA H100, 81559 MiB, driver 560.1")
    program(tmp_path, "nvidia-smi", "echo 'Failed to initialize NVML: Driver/library version mismatch' >&2; exit 18")
    assert doctor.gpu().state == "wrong"
    assert "version mismatch; install the driver anew" in doctor.gpu().text


def test_a_gpu_that_is_not_passed_into_the_container_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "version").write_text("NVRM version")
    monkeypatch.setattr(doctor, "PROC_NVIDIA", tmp_path / "version")
    assert doctor.gpu() == ("wrong", "the host has an NVIDIA driver that is not passed in; mlflow run -A gpus=all")


def test_docker_absent_silent_without_and_with_the_image(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "CONTAINER_MARKS", (tmp_path / "none",))
    assert doctor.docker().text.startswith("not installed: apt-get install docker.io")
    program(tmp_path, "docker", "echo 'Cannot connect to the Docker daemon' >&2; exit 1")
    assert doctor.docker().text.startswith("no daemon answers (Cannot connect to the Docker daemon): start it")
    program(tmp_path, "docker", 'case "$1" in version) echo 20.10;; *) echo no such image >&2; exit 1;; esac')
    assert doctor.docker().text.startswith(f"20.10, no image {doctor.IMAGE}: make image")
    program(tmp_path, "docker", 'case "$1" in version) echo 20.10;; *) echo 0123456789ab;; esac')
    assert doctor.docker() == ("ok", f"20.10, image {doctor.IMAGE} 0123456789ab")


def test_in_a_container_docker_is_not_missed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "CONTAINER_MARKS", (tmp_path,))
    assert doctor.docker() == ("ok", "not needed: this is a container")


REMOTE = "[core]\n    remote = a\n['remote \"a\"']\n    url = "


@pytest.mark.parametrize(
    ("config", "local", "state", "words"),
    [
        ("", "", "note", "dvc remote add -d"),
        (f"{REMOTE}store\n", "", "ok", "a at store"),
        (f"{REMOTE}store\n", "['remote \"a\"']\n    url = /no/where\n", "wrong",
         "mount the disk"),
        ("[core]\n    remote = b\n['remote \"a\"']\n    url = store\n", "", "wrong", "dvc remote default"),
        ("['remote \"a\"']\n    url = store\n", "", "wrong", "no default is set: dvc remote default a"),
        (f"{REMOTE}ssh://me:pw@127.0.0.1:PORT/x\n", "", "wrong", "refused"),
        (f"{REMOTE}s3://bucket\n", "", "note", "dvc status --cloud"),
    ],
)  # fmt: skip
def test_a_dvc_remote_is_found_as_dvc_finds_it_and_looked_for(tmp_path, monkeypatch, config, local, state, words):
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    (tmp_path / ".dvc" / "store").mkdir(parents=True)
    (tmp_path / ".dvc" / "config").write_text(config.replace("PORT", str(closed_port())))
    (tmp_path / ".dvc" / "config.local").write_text(local)
    found = doctor.dvc_remote()
    assert found.state == state, found
    assert words in found.text
    assert "pw" not in found.text


def test_a_store_of_an_older_and_of_a_newer_mlflow_are_wrong_and_say_what_to_do(tmp_path, monkeypatch):
    import sqlite3

    path = tmp_path / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
    assert doctor.tracking() == ("ok", f"sqlite:///{path}: made by the first run")
    for revision, words in (("451aebb31d03", "mlflow db upgrade"), ("ffffffffffff", "newer MLflow; update")):
        path.unlink(missing_ok=True)
        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE alembic_version (version_num TEXT)")
            database.execute("INSERT INTO alembic_version VALUES (?)", [revision])
        assert doctor.tracking().state == "wrong"
        assert words in doctor.tracking().text
    path.write_text("no database at all, but text that is long enough to be looked at" * 20)
    assert "is no SQLite database" in doctor.tracking().text


def test_little_memory_and_little_room_are_wrong(monkeypatch):
    monkeypatch.setattr(doctor, "MEMORY_GIB", 10**6)
    monkeypatch.setattr(doctor, "DISK_GIB", 10**6)
    assert doctor.examine(doctor.memory).state == doctor.examine(doctor.disk).state == "wrong"


def test_a_project_that_was_moved_is_told_with_what_mends_it(tmp_path, monkeypatch):
    import sqlite3

    (tmp_path / ".venv").mkdir()
    stamp, store = tmp_path / ".venv/.complete", tmp_path / "mlflow.db"
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
    with sqlite3.connect(store) as database:
        database.execute("CREATE TABLE experiments (artifact_location TEXT)")
        database.executemany(
            "INSERT INTO experiments VALUES (?)", [[f"file://{tmp_path}/mlartifacts"], ["s3://b/a"], ["mlruns/0"]]
        )
    for text in ("", f"{tmp_path}\n"):  # stamps of an older make setup, and of this folder
        stamp.write_text(text)
        assert not doctor.moved_from()
    assert doctor.tracking().state == "ok"
    stamp.write_text("/not there/house\n")
    assert doctor.packages().state == "wrong"
    assert "moved here from /not there/house" in doctor.packages().text
    assert doctor.packages().text.endswith("make setup")
    with sqlite3.connect(store) as database:
        database.execute("INSERT INTO experiments VALUES ('file:///not%20there/house/mlartifacts')")
    found = doctor.tracking()
    assert found.state == "wrong"
    assert found.text.endswith(f"ln -s {tmp_path} '/not there/house'")
