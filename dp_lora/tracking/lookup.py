"""Find a run, its record and its output by its id."""

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TypedDict
from urllib.parse import unquote, urlparse

from dp_lora.config import ROOT
from dp_lora.errors import InputError
from dp_lora.tracking.store import (
    connect,
    first_line,
    one_line_errors,
    search_runs,
    shown_uri,
    sqlite_path,
    tracking_uri,
)


class FoundRun(TypedDict):
    """A run as the store has it; `artifacts` is its artifact folder where that lies on this machine, else None."""

    run_id: str
    status: str
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]
    artifacts: Path | None


def find_run(run_id: str, kind: str = "run") -> FoundRun:
    """Read a run; `kind` is its name in errors. InputError where the store has no such run; no store is made."""
    path = sqlite_path(tracking_uri())
    if path is not None and not path.exists():
        raise InputError(
            f"{kind}={run_id}: no such run: the tracking store {shown_uri()} is empty; set MLFLOW_TRACKING_URI"
        )
    client = connect()
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_run(run_id)
    except MlflowException as error:
        raise InputError(
            f"{kind}={run_id}: no such run in {shown_uri()} ({first_line(error)}); name an existing run, or set "
            "MLFLOW_TRACKING_URI"
        ) from None
    location = urlparse(found.info.artifact_uri or "")
    local = location.scheme in ("", "file") and location.path
    return FoundRun(
        run_id=run_id,
        status=found.info.status,
        tags=dict(found.data.tags),
        params=dict(found.data.params),
        metrics=dict(found.data.metrics),
        artifacts=Path(unquote(location.path) if location.scheme else location.path) if local else None,
    )


def newest_child(parent: str, stage: str) -> FoundRun | None:
    """The newest run of a stage below a run; None if there is no such run, or the store cannot be asked."""
    with suppress(InputError):
        client = connect()
        condition = f"tags.`mlflow.parentRunId` = '{parent}' and tags.stage = '{stage}'"
        with one_line_errors():
            runs = search_runs(client, condition, max_results=1, order_by=["attributes.start_time DESC"])
        return find_run(runs[0].info.run_id) if runs else None
    return None


def download(run_id: str, artifact: str, folder: Path) -> Path:
    """Bring an artifact of a run into `folder`. Raises InputError where the run has none of that name."""
    client = connect()
    from mlflow.exceptions import MlflowException

    try:
        return Path(client.download_artifacts(run_id, artifact, str(folder)))
    except (MlflowException, OSError) as error:
        raise InputError(f"{run_id}: {artifact} was not recorded ({first_line(error)})") from None


def existing_path(named: str) -> Path | None:
    """`named` as a path from the current folder, else from the project's root; None where it does not exist."""
    return next((path for path in (Path(named), ROOT / named) if named and path.exists()), None)


def resolve_input(path_or_run_id: str, kind: str) -> Path:
    """The folder that a path names, or an MLflow run's tag `output`; `kind` is the parameter's name in errors.

    A relative path counts from the current folder, else from the project's root. Raises InputError for any other value.
    """
    if (path := existing_path(path_or_run_id)) is not None:
        return path
    if not re.fullmatch(r"[0-9a-f]{32}", path_or_run_id):
        raise InputError(f"{kind}={path_or_run_id}: no such path, and not an MLflow run id (32 hex digits)")
    tags = find_run(path_or_run_id, kind)["tags"]
    if "output" not in tags:
        raise InputError(f"{kind}={path_or_run_id}: that run ({tags.get('mlflow.runName', '')}) has no output folder")
    folder = ROOT / tags["output"]
    if not os.path.exists(folder):
        raise InputError(f"{kind}={path_or_run_id}: the run's output {tags['output']} is not on this machine")
    return folder
