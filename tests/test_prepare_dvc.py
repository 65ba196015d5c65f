"""`prepare` in a clone with the real DVC: data are recorded, pushed and pulled; a killed `prepare` is called again."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from dp_lora.config import ROOT
from dp_lora.files import digest_folder
from tests.support.download_server import Server, serving
from tests.support.prepare_call import clone
from tests.support.served import REVISION, ROWS, SETTINGS, archive, parquet, path_of, rows_of

CHECKPOINT_PATH = "/files/cin.zip"


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        running.files |= {path_of(file): parquet(*rows_of(file)) for file in ROWS}
        running.files[CHECKPOINT_PATH] = archive()
        yield running


class Checkout:
    """A clone of the project; its commands run as separate processes."""

    def __init__(self, root: Path, server: Server, tmp_path: Path) -> None:
        self.root = root
        self.overrides = SETTINGS.replace(
            "checkpoint.url=null checkpoint.folder=null", f"checkpoint.url={server.url}{CHECKPOINT_PATH}"
        )
        self.environment = {
            **os.environ,
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "hf"),
            "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
            "DVC_NO_ANALYTICS": "1",
        }
        self.environment.pop("MLFLOW_RUN_ID", None)

    def command(self, *arguments: str) -> list[str]:
        values = {"--config": "celebahq", "--overrides": self.overrides}
        return [sys.executable, "-m", "entrypoints.prepare", *(x for pair in values.items() for x in pair), *arguments]

    def run(self, *command: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, cwd=self.root, env=self.environment, capture_output=True, text=True, check=False, timeout=600
        )

    def dvc(self, *arguments: str) -> str:
        result = self.run(sys.executable, "-m", "dvc", *arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout


def recorded(root: Path) -> dict:
    return yaml.safe_load((root / "data.dvc").read_text())["outs"][0]


@pytest.mark.slow
def test_what_is_prepared_is_recorded_pushed_and_the_same_in_a_fresh_clone(tmp_path: Path, server: Server):
    first = Checkout(clone(ROOT, tmp_path / "first"), server, tmp_path)
    first.dvc("remote", "add", "--default", "here", str(tmp_path / "remote"))
    assert "md5" not in {key for key, value in recorded(first.root).items() if value}
    result = first.run(*first.command())
    assert result.returncode == 0, result.stderr
    assert sorted(p.name for p in (first.root / "data").iterdir() if p.name[0] != ".") == ["celebahq", "cin256"]
    md5 = recorded(first.root)["md5"]
    assert recorded(first.root)["nfiles"] == 60 + 3 + 2  # DVC tracks no hidden file
    first.dvc("push")
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run([*git, "commit", "-qam", "prepared"], cwd=first.root, check=True)
    assert first.dvc("diff", "--targets", "data").strip() == ""
    subprocess.run([*git, "clone", "-q", str(first.root), str(tmp_path / "second")], check=True)
    second = Checkout(tmp_path / "second", server, tmp_path)
    # pull one part, then all
    second.dvc("pull", "data/cin256")
    assert [p.name for p in (second.root / "data").iterdir()] == ["cin256"]
    assert digest_folder(second.root / "data/cin256") == digest_folder(first.root / "data/cin256")
    assert recorded(second.root)["md5"] == md5
    second.dvc("pull", "data.dvc")
    assert digest_folder(second.root / "data/celebahq") == digest_folder(first.root / "data/celebahq")
    assert second.dvc("diff", "--targets", "data").strip() == ""
    # prepare finds everything there, sends no request, and records the same
    server.files.clear()
    server.requests.clear()
    result = second.run(*second.command())
    assert result.returncode == 0, result.stderr
    assert not server.requests
    assert recorded(second.root)["md5"] == md5
    (second.root / "data/celebahq/images/train-000003.png").write_bytes(b"another")
    assert "train-000003.png" in second.dvc("diff", "--targets", "data")


@pytest.mark.slow
def test_either_part_alone_is_recorded(tmp_path: Path, server: Server):
    checkout = Checkout(clone(ROOT, tmp_path / "first"), server, tmp_path)
    overrides = f"checkpoint.folder=data/cin256 checkpoint.url={server.url}{CHECKPOINT_PATH}"
    result = checkout.run(*checkout.command("--config", "mnist5k", "--overrides", overrides))
    assert result.returncode == 0, result.stderr
    assert recorded(checkout.root)["nfiles"] == 2
    result = checkout.run(*checkout.command())
    assert result.returncode == 0, result.stderr
    assert recorded(checkout.root)["nfiles"] == 65


@pytest.mark.slow
@pytest.mark.parametrize("rows", [5, 30, 45])
def test_killed_at_any_instant_a_second_call_goes_on_and_no_worker_is_left(tmp_path: Path, server: Server, rows: int):
    checkout = Checkout(clone(ROOT, tmp_path / "first"), server, tmp_path)
    process = subprocess.Popen(
        checkout.command(),
        cwd=checkout.root,
        env=checkout.environment,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    images = checkout.root / "data/.celebahq.part/dataset/images"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and (not images.exists() or len(os.listdir(images)) < rows):
        time.sleep(0.002)
    # kill the parent alone: its workers must notice by themselves
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (checkout.root / "data/celebahq").exists()
    deadline = time.monotonic() + 30
    while _session(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _session(process.pid)
    result = checkout.run(*checkout.command())
    assert result.returncode == 0, result.stderr
    other = Checkout(clone(ROOT, tmp_path / "other"), server, tmp_path)
    assert other.run(*other.command()).returncode == 0
    assert digest_folder(checkout.root / "data") == digest_folder(other.root / "data")


def _session(leader: int) -> list[int]:
    """Processes of the session that `leader` started, without zombies."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[3] == str(leader) and fields[0] != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.slow
def test_a_disk_that_fills_up_is_one_line_and_with_room_the_same_command_goes_on(tmp_path: Path, server: Server):
    checkout = Checkout(clone(ROOT, tmp_path / "first"), server, tmp_path)
    data = checkout.root / "data"
    data.mkdir()
    # enough room by the estimate, but too little in pages of 4 KiB
    mount = ["mount", "-t", "tmpfs", "-o", "size=208k", "tmpfs", str(data)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    try:
        result = checkout.run(*checkout.command())
        assert result.returncode == 1
        line = result.stderr.splitlines()[-1]
        assert line.startswith("error: ")
        assert "No space left on device" in line
        assert "goes on" in line
        assert [p.name for p in data.iterdir() if p.name[0] != "."] == []
        kept = len((data / ".celebahq.part/rows.jsonl").read_text().splitlines())
        assert kept > 0
        subprocess.run(["mount", "-o", "remount,size=64m", str(data)], check=True)
        result = checkout.run(*checkout.command())
        assert result.returncode == 0, result.stderr
        assert REVISION in (data / "celebahq/source.json").read_text()
    finally:
        subprocess.run(["umount", "-l", str(data)], check=True)
