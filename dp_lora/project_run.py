"""Shared code of the project backends: the store in which a run is made, and its tags."""

import os
from collections.abc import Mapping

import mlflow
from mlflow import MlflowClient
from mlflow.projects.utils import get_or_create_run

from dp_lora.tracking.process import process_tags
from dp_lora.tracking.store import (
    EXPERIMENT,
    connect,
    joined_run_id,
    named_experiment,
    one_line_errors,
    sqlite_path,
    tracking_uri,
)

DEFAULT_EXPERIMENT = "0"  # what MLflow's command line means where nobody named an experiment


def use_project_store(experiment_id: str) -> str:
    """Make the project's store the one that MLflow uses from here on; returns the experiment's id in that store.

    Where nobody named an experiment it is `dp-lora`, as for a direct call.
    """
    uri = tracking_uri()
    before = mlflow.get_tracking_uri()
    moved = sqlite_path(before) != sqlite_path(uri)
    named = os.environ.get("MLFLOW_EXPERIMENT_ID") or os.environ.get("MLFLOW_EXPERIMENT_NAME")
    name = None
    if experiment_id == DEFAULT_EXPERIMENT and not named:
        name = EXPERIMENT
    elif moved:
        # without MLFLOW_TRACKING_URI the command line has looked in the current folder's mlflow.db
        name = MlflowClient(before).get_experiment(experiment_id).name
    mlflow.set_tracking_uri(uri)
    client = connect()
    with one_line_errors():
        return experiment_id if name is None else named_experiment(client, name)


def make_run(
    project_uri: str,
    experiment_id: str,
    work_dir: str,
    version: str | None,
    entry_point: str,
    params: Mapping[str, str] | None,
) -> str:
    """Make a RUNNING run of an entry point, with its params; returns its id."""
    return get_or_create_run(None, project_uri, experiment_id, work_dir, version, entry_point, params or {}).info.run_id


def tag_run(client: MlflowClient, run_id: str, backend: str) -> None:
    """Tag a new run with its backend, its process and, inside another run, its parent."""
    # the command line sets the backend's name only after a success
    tags = {"mlflow.project.backend": backend} | process_tags()
    parent = joined_run_id()
    for key, value in (tags if parent is None else tags | {"mlflow.parentRunId": parent}).items():
        client.set_tag(run_id, key, value)
