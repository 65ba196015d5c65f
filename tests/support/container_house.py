"""The container tests' calls of `mlflow run`: as an ordinary user, with a server or the project's own store."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient

from dp_lora import __version__

IMAGE = f"localhost/dp-lora:{__version__}"
HOST_STORE_FOLDER = Path("/mlflow.db")  # Docker makes this folder when MLflow mounts its relative default store
USER = 12345  # root runs the commands as this ordinary user, so that the files are not root's
FIRST_STEPS = 3  # lines of a ledger after which a fine-tuning is stopped


def must(command: Sequence[Any], **arguments: Any) -> str:
    """Run a command and return its output; if it fails, the test fails with its last lines."""
    words = [str(word) for word in command]
    result = subprocess.run(words, capture_output=True, text=True, check=False, **arguments)
    if result.returncode:
        pytest.fail(f"{' '.join(words)}: {result.returncode}\n{result.stdout[-3000:]}{result.stderr[-3000:]}")
    return result.stdout


class House:
    """One project folder, and the address of the store for its runs."""

    def __init__(self, project: Path, server: str):
        self.project, self.server = project, server
        # without this the client would ask another store for the models among a run's artifacts
        mlflow.set_tracking_uri(server)
        self.client = MlflowClient(server)
        self.user = USER if os.getuid() == 0 else os.getuid()

    def give_to_user(self, folder: Path) -> None:
        if os.getuid() != 0:
            return
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, USER, USER, follow_symlinks=False)
        for parent in folder.parents:
            # pytest closes its temporary folders to other users
            if parent.stat().st_uid == 0 and "pytest" in parent.name:
                parent.chmod(0o755)

    def _as_user(self) -> list[str]:
        if os.getuid() != 0:
            return []
        group = Path("/var/run/docker.sock").stat().st_gid
        # the user is ordinary, but may read this Python environment wherever it lies
        reading = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
        return ["setpriv", "--reuid", str(USER), "--regid", str(USER), "--groups", str(group), *reading]

    def environment(self, **values: str) -> dict[str, str]:
        programs = Path(sys.executable).parent
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        kept |= {"HOME": str(self.project.parent), "USER": "tester", "OMP_NUM_THREADS": "1"}
        kept |= {"PATH": f"{programs}{os.pathsep}{kept['PATH']}", "MLFLOW_TRACKING_URI": self.server}
        kept |= {"DPLORA_PYTHON": sys.executable, "DVC_NO_ANALYTICS": "1"}
        return {name: value for name, value in {**kept, **values}.items() if value}

    def command(self, entry: str, *parameters: str, backend: str = "local", arguments: Sequence[str] = ()) -> list[str]:
        values = [word for parameter in parameters for word in ("-P", parameter)]
        return [*self._as_user(), "mlflow", "run", ".", "-b", backend, "-e", entry, *values, *arguments]

    def mlflow_run(
        self, entry: str, *parameters: str, project: Path | None = None, backend: str = "local", **values: str
    ) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(entry, *parameters, backend=backend),
            cwd=project or self.project,
            env=self.environment(**values),
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )

    def native(self, *command: str) -> str:
        """Run a command of this environment as the user on the host, and return its output."""
        return must([*self._as_user(), sys.executable, "-m", *command], cwd=self.project, env=self.environment())

    def start(self, entry: str, *parameters: str, **values: str) -> subprocess.Popen:
        """Start `mlflow run` as a terminal does, in a process group of its own."""
        return subprocess.Popen(
            self.command(entry, *parameters),
            cwd=self.project,
            env=self.environment(**values),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def runs(self, *stages: str, client: MlflowClient | None = None) -> list[Any]:
        """All runs, or those of the named stages alone, newest first."""
        client = client or self.client
        found = client.search_runs([e.experiment_id for e in client.search_experiments()], max_results=500)
        found = [run for run in found if not stages or run.data.tags.get("stage") in stages]
        return sorted(found, key=lambda run: run.info.start_time, reverse=True)

    def last_run(self, stage: str) -> Any:
        return self.runs(stage)[0]

    def containers(self) -> list[str]:
        """Ids of the running containers that have this project mounted."""
        found = must(["docker", "ps", "--quiet", "--no-trunc", "--filter", f"volume={self.project}"])
        return found.split()

    def end_containers(self) -> None:
        for container in self.containers():
            must(["docker", "rm", "--force", container])

    def ledgers(self) -> dict[Path, str]:
        return {path: path.read_text(encoding="utf-8") for path in self.project.glob("runs/**/ledger.jsonl")}

    def wait_for_steps(self, before: dict[Path, str], process: subprocess.Popen) -> tuple[Path, str]:
        """Wait until a new ledger has a few lines; gives its path and its text."""
        end = time.monotonic() + 600
        while time.monotonic() < end and process.poll() is None:
            for path, text in self.ledgers().items():
                if path not in before and len(text.splitlines()) > FIRST_STEPS:
                    return path, text
            time.sleep(0.2)
        process.kill()
        pytest.fail(f"no step was taken: {process.communicate()[0][-3000:]}")

    def wait_for_end(self, container: str) -> None:
        end = time.monotonic() + 120
        while container in self.containers():
            assert time.monotonic() < end, f"container {container} still runs"
            time.sleep(0.2)
