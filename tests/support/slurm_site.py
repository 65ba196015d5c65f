"""A project on a cluster of one node: the commands that a user types there, and their runs."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from tests.support.slurm_node import Node
from tests.support.tiny import make_base, tiny_config, tiny_dataset
from tests.support.tiny_project import EXPERIMENT, clean_environment, tiny_project

SETTINGS = (
    "data.classes=[x,y] data.n_public=40 privacy.batch_size=8 train.checkpoint_every=100 train.grid_every=0 "
    "sampling.n=8"
)
PATIENCE = 900.0  # seconds at most: a job imports torch on cores that other processes use too


class Site:
    """A tiny project with a base model and private data, for a user of `node`."""

    def __init__(self, folder: Path, node: Node):
        self.node = node
        self._started: list[subprocess.Popen[str]] = []
        self.project = tiny_project(folder / "project")
        make_base(self.project / "outputs/letters/ldm", tiny_config())
        tiny_dataset(self.project / f"outputs/{EXPERIMENT}/data")
        self.client = MlflowClient(f"sqlite:///{self.project}/mlflow.db")

    def environment(self, **values: str) -> dict[str, str]:
        paths = [str(self.project), os.environ.get("PYTHONPATH", "")]
        own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1"}
        return {**clean_environment(), **self.node.environment, **own, **values}

    def command(
        self, entry: str, overrides: str, config: Mapping[str, Any], parameters: Mapping[str, str]
    ) -> list[str]:
        path = self.project.parent / "slurm.json"
        path.write_text(json.dumps({"partition": "debug", "cpus": 1, **config}), encoding="utf-8")
        given = {"config": EXPERIMENT, **parameters, "overrides": f"{SETTINGS} {overrides}".strip()}
        words = [word for name, value in given.items() for word in ("-P", f"{name}={value}")]
        mlflow = str(Path(sys.executable).with_name("mlflow"))
        return [mlflow, "run", ".", "-b", "slurm", "--backend-config", str(path), "-e", entry, *words]

    def run(
        self, entry: str, overrides: str = "", parameters: Mapping[str, str] | None = None, **config: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run `mlflow run . -b slurm` to its end."""
        return self._called(self.command(entry, overrides, config, parameters or {}), 2 * PATIENCE)

    def start(self, entry: str, overrides: str = "", **config: Any) -> subprocess.Popen[str]:
        """Start the same command in the background, in a process group of its own."""
        # reset these signals: a background job ignores them and its children inherit that
        heard = ["env", "--default-signal=INT", "--default-signal=HUP"]
        process = subprocess.Popen(
            [*heard, *self.command(entry, overrides, config, {})],
            cwd=self.project, env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        self._started.append(process)
        return process

    def close(self) -> None:
        """End the processes that a failed test has left."""
        for process in self._started:
            process.kill()
            process.wait()

    def ours(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run another command of ours, `python -m dp_lora WORDS`."""
        return self._called([sys.executable, "-m", "dp_lora", *words], PATIENCE)

    def _called(self, command: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.project,
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )

    def last(self) -> Any:
        """The newest run that is itself a job, not a stage of one; None before the first."""
        experiments = [experiment.experiment_id for experiment in self.client.search_experiments()]
        jobs = "tags.`mlflow.project.backend` = 'slurm'"
        found = self.client.search_runs(experiments, jobs, order_by=["attributes.start_time DESC"], max_results=1)
        return found[0] if found else None

    def newest(self) -> str:
        """The newest run's id; empty before the first."""
        run = self.last()
        return run.info.run_id if run else ""

    def sent(self, before: str) -> str:
        """Wait until the job of a run newer than `before` is sent; gives the run's id."""
        self.until(lambda: self.newest() != before and "slurm.state" in self.last().data.tags, "the job is sent")
        return self.newest()

    def get(self, run_id: str) -> Any:
        return self.client.get_run(run_id)

    def log(self, run_id: str) -> str:
        """The output of a job so far."""
        path = self.project / "runs/slurm" / run_id / "job.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else "(no output)"

    def steps(self, run_id: str) -> int:
        """Number of lines of a run's ledger."""
        path = self.project / "runs" / run_id / "ledger.jsonl"
        return path.read_text(encoding="utf-8").count("\n") if path.exists() else 0

    def until(self, holds: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not holds():
            if time.monotonic() > end:
                run = self.last()
                raise AssertionError(f"{what}: not so\n{run}\n{self.log(run.info.run_id)[-3000:]}")
            time.sleep(0.3)
