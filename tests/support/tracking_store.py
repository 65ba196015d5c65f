"""A tracking store of a test's own, its runs and their artifacts."""

import atexit
import contextlib
import functools
import shutil
import tempfile
from pathlib import Path

from dp_lora import tracking
from dp_lora.tracking import store


@functools.cache
def empty_store() -> Path:
    """A fresh mlflow.db, made once per process: MLflow takes seconds to write its tables."""
    from mlflow import MlflowClient

    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # MLflow's experiment 0 keeps its artifacts below the current folder
    with contextlib.chdir(folder):
        MlflowClient(store.sqlite_uri(folder / "mlflow.db"))
    return folder / "mlflow.db"


def use_store(folder: Path, monkeypatch):
    """Give one test its own store, which MLFLOW_TRACKING_URI names; returns a client."""
    import mlflow

    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    shutil.copyfile(empty_store(), folder / "mlflow.db")
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.sqlite_uri(folder / "mlflow.db"))
    return mlflow.MlflowClient(store.tracking_uri())


def all_runs(client):
    return client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])


def artifacts(run_id) -> Path:
    folder = tracking.find_run(run_id)["artifacts"]
    assert folder is not None
    return folder


def made_run(client, **arguments):
    """A RUNNING run as `mlflow run` makes it."""
    return client.create_run("0", **arguments).info.run_id
