"""What a project of this kind needs, looked at: one line each, and for what is wrong what to do. Never a traceback.

`ok`: fine. `note`: absent, and only needed for some things. `wrong`: something will fail; the exit status is 1 then.
Nothing but the standard library is imported before the packages have been looked at.
"""

from __future__ import annotations

import configparser
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dp_lora import __version__

ROOT = Path(__file__).resolve().parents[1]
IMAGE = f"localhost/dp-lora:{__version__}"
OK, NOTE, WRONG = "ok", "note", "wrong"
SHOWN = ("torch", "diffusers", "peft", "opacus", "mlflow", "dvc")
MEMORY_GIB = 4  # enough for the default experiment
DISK_GIB = 10  # environment and default experiment, and some room
SECONDS = 15.0  # for an answer of another program
PROC_NVIDIA = Path("/proc/driver/nvidia/version")
CONTAINER_MARKS = (Path("/.dockerenv"), Path("/run/.containerenv"))


class Finding(NamedTuple):
    """One line: `state` of OK, NOTE, WRONG; what was found, and what to do."""

    state: str
    text: str


def python() -> Finding:
    """Python's version and platform."""
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if not (3, 11) <= sys.version_info[:2] < (3, 14):
        return Finding(WRONG, f"{found}: Python 3.11 to 3.13 is needed; make setup PYTHON=python3.11")
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return Finding(WRONG, f"{found}: requirements.lock is for Linux on x86-64")
    return Finding(OK, found)


def moved_from() -> str:
    """The folder that `make setup` made .venv for, where that is not this one; empty: this one, or not known."""
    stamp = ROOT / ".venv" / ".complete"
    if stamp.parent.is_symlink() or not stamp.is_file():
        return ""
    place = stamp.read_text(encoding="utf-8").rstrip("\n")
    return "" if place == str(ROOT) else place


def packages() -> Finding:
    """Installed packages beside the pins of pyproject.toml."""
    if place := moved_from():
        return Finding(WRONG, f"the project was moved here from {place}, where the programs of .venv look: make setup")
    import tomllib
    from importlib.metadata import PackageNotFoundError, version

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found, other = {}, []
    for requirement in project["dependencies"]:
        name, wanted = requirement.split("==")
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            found[name] = "missing"
        if found[name] != wanted:
            other.append(f"{name} {found[name]}, not {wanted}")
    if other:
        return Finding(WRONG, f"{'; '.join(other[:4])}{' ...' if len(other) > 4 else ''}: make setup, or make image")
    shown = ", ".join(f"{name} {found[name]}" for name in SHOWN)
    return Finding(OK, f"dp-lora {__version__}; {shown}; all {len(found)} as pinned")


def code() -> Finding:
    """The commit, by which runs are reproduced."""
    if shutil.which("git") is None:
        return Finding(WRONG, "git is missing: DVC needs it; apt-get install git")
    done = _run("git", "-C", str(ROOT), "log", "-1", "--format=%h %cs")
    if done.returncode:
        return Finding(WRONG, f"{_last_line(done)}: runs record no commit, and DVC stops")
    return Finding(OK, f"commit {done.stdout.strip()}")


def gpu() -> Finding:
    """Driver and GPUs."""
    if shutil.which("nvidia-smi") is None:
        if PROC_NVIDIA.exists():
            return Finding(WRONG, "the host has an NVIDIA driver that is not passed in; mlflow run -A gpus=all")
        return Finding(NOTE, "none, training runs on the CPU; in a container of a GPU host: mlflow run -A gpus=all")
    done = _run("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    if done.returncode or not done.stdout.strip():
        return Finding(WRONG, f"nvidia-smi: {_last_line(done)}; install the driver anew, or restart the machine")
    name, driver, memory = (part.strip() for part in done.stdout.strip().splitlines()[0].split(","))
    return Finding(OK, f"{len(done.stdout.strip().splitlines())} x {name}, {memory}, driver {driver}")


def memory() -> Finding:
    """Memory that can still be had, under the container's limit."""
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    total, free = (int(_number(rf"^{name}:\s+(\d+) kB", text)) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit, used = (_bytes_of(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit is not None and limit < total:
        total, free = limit, min(free, max(0, limit - (used or 0)))
    found = f"{_gib(free)} of {_gib(total)} free, {os.cpu_count()} cores"
    if free < MEMORY_GIB * 2**30:
        return Finding(
            WRONG, f"{found}: the default experiment wants {MEMORY_GIB} GiB; lower compute.physical_batch_size"
        )
    return Finding(OK, found)


def disk() -> Finding:
    """Room at the project's root."""
    usage = shutil.disk_usage(ROOT)
    found = f"{_gib(usage.free)} of {_gib(usage.total)} free"
    if not os.access(ROOT, os.W_OK):
        return Finding(WRONG, f"the project's folder cannot be written by user id {os.getuid()}; run as its owner")
    if usage.free < DISK_GIB * 2**30:
        return Finding(WRONG, f"{found}: less than {DISK_GIB} GiB; `make clean`, `dvc gc --workspace`")
    return Finding(OK, found)


def docker() -> Finding:
    """The docker daemon and the project's image."""
    if shutil.which("docker") is None and in_container():
        return Finding(OK, "not needed: this is a container")
    if shutil.which("docker") is None:
        return Finding(NOTE, "not installed: apt-get install docker.io; or mlflow run -b native, which needs none")
    done = _run("docker", "version", "--format", "{{.Server.Version}}")
    if done.returncode:
        hint = "start it; its socket is for root and the group docker, or set DOCKER_HOST"
        return Finding(NOTE, f"no daemon answers ({_last_line(done)}): {hint}; or mlflow run -b native")
    image = _run("docker", "image", "inspect", "--format", "{{slice .Id 7 19}}", IMAGE)
    if image.returncode:
        return Finding(NOTE, f"{done.stdout.strip()}, no image {IMAGE}: make image; or mlflow run -b native")
    return Finding(OK, f"{done.stdout.strip()}, image {IMAGE} {image.stdout.strip()}")


def tracking() -> Finding:
    """The tracking store."""
    from dp_lora.tracking.store import shown_uri, sqlite_path, store_problem, tracking_uri

    shown, path, problem = shown_uri(), sqlite_path(tracking_uri()), store_problem()
    if problem is not None:
        return Finding(WRONG, f"{shown}: {problem}")
    if path is None:
        return Finding(OK, shown)
    there = path if path.exists() else path.parent
    if not os.access(there, os.W_OK):
        return Finding(WRONG, f"{shown}: cannot be written by user id {os.getuid()}; set MLFLOW_TRACKING_URI")
    if gone := _artifacts_elsewhere(path):
        remedy = f"was the project moved? ln -s {shlex.quote(str(path.parent))} {shlex.quote(str(gone.parent))}"
        return Finding(WRONG, f"{shown}: says that artifacts and models lie in {gone}, which is not there: {remedy}")
    return Finding(OK, shown if path.exists() else f"{shown}: made by the first run")


def _artifacts_elsewhere(store: Path) -> Path | None:
    """A folder that a SQLite store names for artifacts by its whole path, and that is not there any more."""
    import sqlite3
    from contextlib import closing
    from urllib.parse import unquote, urlparse

    if not store.is_file():
        return None
    with closing(sqlite3.connect(f"{store.absolute().as_uri()}?mode=ro", uri=True)) as database:
        known = database.execute("SELECT name FROM sqlite_master WHERE name = 'experiments'").fetchone()
        rows = database.execute("SELECT artifact_location FROM experiments").fetchall() if known else []
    places = [urlparse(location) for (location,) in rows if location]
    folders = [Path(unquote(place.path)) for place in places if place.scheme in ("", "file")]
    # one that no run has written to is not there either, beside a store that is
    return next((folder for folder in folders if folder.is_absolute() and not folder.parent.is_dir()), None)


def dvc_remote() -> Finding:
    """The DVC remote that `dvc pull` and `dvc push` take."""
    remotes, default = _dvc_remotes(ROOT / ".dvc")
    if not remotes:
        return Finding(NOTE, "none, only dvc push and dvc pull need one: dvc remote add -d NAME FOLDER_OR_ADDRESS")
    name = default or next(iter(remotes))
    url = remotes.get(name)
    if url is None:
        return Finding(WRONG, f"core.remote names {name}, which .dvc/config does not have: dvc remote default NAME")
    shown = f"{name} at {re.sub(r'//[^/@]*@', '//', url)}"
    if default is None:
        return Finding(WRONG, f"{shown}: no default is set: dvc remote default {name}")
    return _reach(shown, url)


def _reach(shown: str, url: str) -> Finding:
    if "://" not in url:
        folder = Path(url) if os.path.isabs(url) else ROOT / ".dvc" / url
        parent = folder if folder.exists() else folder.parent
        if not os.access(parent, os.W_OK):
            return Finding(WRONG, f"{shown}: not there or not writable; mount the disk, or dvc remote modify")
        return Finding(OK, shown)
    import socket
    from urllib.parse import urlparse

    parts = urlparse(url)
    ports = {"http": 80, "https": 443, "webdav": 80, "webdavs": 443, "ssh": 22}
    if parts.scheme not in ports or parts.hostname is None:
        return Finding(NOTE, f"{shown}: not looked at; dvc status --cloud tells")
    try:
        with socket.create_connection((parts.hostname, parts.port or ports[parts.scheme]), timeout=SECONDS):
            return Finding(OK, shown)
    except OSError as error:
        return Finding(WRONG, f"{shown}: {error.strerror or error}; look at network and proxy, or dvc remote modify")


def _dvc_remotes(folder: Path) -> tuple[dict[str, str], str | None]:
    """URLs by name, and the default's name; config.local wins, as in DVC."""
    remotes, default = {}, None
    for name in ("config", "config.local"):
        parser = configparser.ConfigParser(interpolation=None)
        # DVC indents the keys of a section
        path = folder / name
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        parser.read_string("\n".join(line.strip() for line in text.splitlines()))
        for section in parser.sections():
            found = re.fullmatch(r"'?remote \"(.+)\"'?", section)
            if found and parser.has_option(section, "url"):
                remotes[found[1]] = parser.get(section, "url")
        default = parser.get("core", "remote", fallback=default)
    return remotes, default


CHECKS: dict[str, Callable[[], Finding]] = {
    "python": python,
    "packages": packages,
    "code": code,
    "gpu": gpu,
    "memory": memory,
    "disk": disk,
    "docker": docker,
    "tracking store": tracking,
    "dvc remote": dvc_remote,
}


def examine(check: Callable[[], Finding]) -> Finding:
    """A check's finding on one line; a failure of the check itself is a finding too."""
    try:
        found = check()
    except ModuleNotFoundError as error:
        found = Finding(WRONG, f"the package {error.name} is missing: make setup")
    except Exception as error:
        found = Finding(WRONG, f"could not be looked at: {type(error).__name__}: {error}")
    return Finding(found.state, " ".join(found.text.split()))


def main() -> int:
    """Print one line per check; 1 where something is wrong."""
    states = []
    for name, check in CHECKS.items():
        found = examine(check)
        states.append(found.state)
        print(f"{found.state:<6}{name:<15} {found.text}", flush=True)
    return int(WRONG in states)


def in_container() -> bool:
    """Whether this process runs in a container of docker's or podman's."""
    return any(mark.exists() for mark in CONTAINER_MARKS)


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer within {SECONDS:g} seconds")


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return lines[-1].strip().rstrip(".") if lines else f"status {done.returncode}"


def _number(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    if found is None:
        raise ValueError(f"/proc/meminfo has no {pattern}")
    return found[1]


def _bytes_of(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        # no such limit, or "max"
        return None


def _gib(number: int) -> str:
    return f"{number / 2**30:.1f} GiB"


if __name__ == "__main__":
    sys.exit(main())
