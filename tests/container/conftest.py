"""Docker, the image, the MLflow server over PostgreSQL and a copy of the project: started here, ended here."""

import os
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from dp_lora.config import ROOT
from tests.support.container_house import HOST_STORE_FOLDER, IMAGE, House, must
from tests.support.emnist_project import emnist_and_mnist, project_with_a_tiny_experiment
from tests.support.tracking_server import free_port

DOCKER = ROOT / "docker"
SERVER_MINUTES = 3


@pytest.fixture(scope="session")
def daemon():
    """Docker's daemon: the one that runs, else one by hand, ended at the end."""
    ran = subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0
    must([DOCKER / "daemon.sh", "start"])
    yield
    if not ran:
        must([DOCKER / "daemon.sh", "stop"])


@pytest.fixture(scope="session")
def image(daemon):
    """The digest of the image, built now (from Docker's cache where nothing has changed)."""
    must(["make", "-C", ROOT, "image"])
    return must(["docker", "image", "inspect", "--format", "{{.Id}}", IMAGE]).strip()


def compose_command() -> list[str]:
    """`docker compose`, or the older `docker-compose`, or nothing."""
    if subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0:
        return ["docker", "compose"]
    found = shutil.which("docker-compose")
    return [found] if found else []


def wait_for(address: str) -> None:
    end = time.monotonic() + 60 * SERVER_MINUTES
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(1)
    pytest.fail(f"the MLflow server at {address} did not come up in {SERVER_MINUTES} minutes")


@pytest.fixture(scope="session")
def server(image):
    """The address of compose.yaml's MLflow server; its two services by hand where compose is missing."""
    port, name = free_port(), f"dplora-test-{os.getpid()}"
    address = f"http://127.0.0.1:{port}"
    compose = compose_command()
    environment = {**os.environ, "DPLORA_PORT": str(port)}
    if compose:
        command = [*compose, "-f", DOCKER / "compose.yaml", "-p", name]
        print(f"the server by {' '.join(compose)}")
        start = [[*command, "up", "-d"]]
        stop = [[*command, "down", "--volumes", "--timeout", "20"]]
    else:
        print("compose is missing: the server by hand")
        volumes = [f"{name}_{volume}" for volume in ("database", "socket", "artifacts")]
        run = ["docker", "run", "--detach", "--volume", f"{volumes[1]}:/run/database"]
        database = ["--name", f"{name}-database", "--network", "none", "--volume", f"{volumes[0]}:/srv/database"]
        mlflow = ["--name", f"{name}-mlflow", "--network", "host", "--volume", f"{volumes[2]}:/srv/artifacts"]
        mlflow += ["--env", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false"]
        served = [
            "mlflow",
            "server",
            "--backend-store-uri",
            "postgresql+psycopg2://dp-lora@/postgres?host=/run/database",
        ]
        served += ["--artifacts-destination", "/srv/artifacts", "--host", "127.0.0.1", "--port", str(port)]
        start = [
            [*run, *database, IMAGE, "/opt/dp-lora/database.sh"],
            [*run, *mlflow, "--workdir", "/tmp", IMAGE, *served, "--workers", "2"],
        ]
        stop = [["docker", "rm", "--force", f"{name}-mlflow", f"{name}-database"], ["docker", "volume", "rm", *volumes]]
    try:
        for command in start:
            must(command, env=environment)
        wait_for(address)
        yield address
    finally:
        for command in stop:
            must(command, env=environment)


@pytest.fixture(scope="session")
def house(server, tmp_path_factory):
    """A copy of the project with tiny data, owned by an ordinary user, whose runs go to the server."""
    there = HOST_STORE_FOLDER.exists()
    folder = tmp_path_factory.mktemp("container")
    # a repository of its own: of a worktree the container would see no commit
    project = project_with_a_tiny_experiment(folder / "project")
    emnist_and_mnist(project)
    home = House(project, server)
    home.give_to_user(folder)
    yield home
    home.end_containers()
    if not there and HOST_STORE_FOLDER.is_dir():
        # MLflow's Docker runner has the daemon make it for its default store
        HOST_STORE_FOLDER.rmdir()


@pytest.fixture(scope="session")
def made(house):
    """`main` of the tiny experiment, in the container: its run's id."""
    result = house.mlflow_run("main", "config=emnist-tiny")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return house.last_run("main").info.run_id


@pytest.fixture
def second_project(house, made) -> Path:
    """A copy of the project as `main` left it, without its runs."""
    target = house.project.parent / f"copy-{time.monotonic_ns()}"
    shutil.copytree(house.project, target, symlinks=True, ignore=shutil.ignore_patterns("runs", "mlflow.db*"))
    house.give_to_user(target)
    yield target
    shutil.rmtree(target)
