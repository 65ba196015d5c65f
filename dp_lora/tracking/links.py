"""Addresses of the UI's pages that matter."""

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import quote

from dp_lora.config import STAGES
from dp_lora.tracking.reachable import is_server
from dp_lora.tracking.shared_view import DISTANCES, KEY, PAGES, set_view
from dp_lora.tracking.store import connect, one_line_errors, search_runs, shown_uri, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SCORED = {stage.name for stage in STAGES.values() if stage.scored}
GRID = "grid.png"
RUNS = 1000  # newest runs that are searched
HOST, PORT = "127.0.0.1", 5000  # of `make ui`, unless another port is typed


def local_ui(port: int = PORT) -> str:
    """The address at which `make ui` serves the pages of a store that is no server."""
    return f"http://{HOST}:{port}"


def ui_address() -> str:
    """The address of the pages of this store's runs, without credentials: the server's own, else that of `make ui`."""
    return shown_uri().rstrip("/") if is_server(tracking_uri()) else local_ui()


def chart_page(address: str, experiment_id: str) -> str:
    """The charts over all runs of an experiment."""
    return f"{address}/#/experiments/{experiment_id}/runs?{PAGES}&compareRunsMode=CHART"


def view_page(address: str, experiment_id: str, charts: bool = False) -> str:
    """The experiment's shared view: its table, or its charts."""
    mode = "&compareRunsMode=CHART" if charts else ""
    return f"{address}/#/experiments/{experiment_id}/runs?{PAGES}&viewStateShareKey={KEY}{mode}"


def model_page(address: str, name: str) -> str:
    """A registered model, with its versions and aliases."""
    return f"{address}/#/models/{quote(name, safe='')}?{PAGES}"


def comparison_page(address: str, experiment_id: str, run_ids: Sequence[str]) -> str:
    """Runs side by side."""
    runs, experiments = (quote(json.dumps(ids)) for ids in (list(run_ids), [experiment_id]))
    # the page reads `runs` only as the first parameter
    return f"{address}/#/compare-runs?runs={runs}&experiments={experiments}&{PAGES}"


def run_page(address: str, experiment_id: str, run_id: str) -> str:
    """A run."""
    return f"{address}/#/experiments/{experiment_id}/runs/{run_id}?{PAGES}"


def artifact_page(address: str, experiment_id: str, run_id: str, path: str) -> str:
    """An artifact of a run."""
    return f"{address}/#/experiments/{experiment_id}/runs/{run_id}/artifacts/{path}?{PAGES}"


def ui_links(address: str) -> dict[str, str]:
    """Pages worth opening, by name; `address` is the server's. Only `runs` while the store has no run of ours."""
    client = connect()
    with one_line_errors():
        finished, newest_first = "attributes.status = 'FINISHED'", ["attributes.end_time DESC"]
        found = search_runs(client, finished, _named(client), max_results=RUNS, order_by=newest_first)
    runs = [run for run in found if "stage" in run.data.tags]  # ours
    if not runs:
        return {"runs": f"{address}/#/experiments"}
    # the bare `mlflow run` in a container makes its runs in MLflow's "Default": look where the newest run is
    experiment = runs[0].info.experiment_id
    runs = [run for run in runs if run.info.experiment_id == experiment]
    with one_line_errors():
        found_experiment = client.get_experiment(experiment)
    distances = [name for name in DISTANCES if any(name in run.data.metrics for run in runs)]
    if set_view(client, found_experiment, distances or DISTANCES):
        links = {"charts": view_page(address, experiment, charts=True), "table": view_page(address, experiment)}
    else:
        links = {"charts": chart_page(address, experiment)}
    compared = latest_per_epsilon(runs)
    if len(compared) > 1:
        links["latest run per epsilon"] = comparison_page(address, experiment, [run.info.run_id for run in compared])
    sampled = next((run for run in runs if run.data.tags.get("stage") == "sample"), None)
    if sampled is not None:
        links["newest sample grid"] = artifact_page(address, experiment, sampled.info.run_id, GRID)
    registered = next((run.data.tags["model"] for run in runs if "model" in run.data.tags), None)
    if registered is not None:
        links["newest registered model"] = model_page(address, registered.split("/")[1])
    return links


def _named(client: "MlflowClient") -> list[str] | None:
    """The experiment that the environment names, empty while it does not exist; None where none is named."""
    if identifier := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return [identifier]
    if name := os.environ.get("MLFLOW_EXPERIMENT_NAME"):
        found = client.get_experiment_by_name(name)
        return [] if found is None else [found.experiment_id]
    return None


def latest_per_epsilon(runs: Sequence["Run"]) -> list["Run"]:
    """The newest scored run per target epsilon, sorted by it, in the newest one's experiment; `runs`: newest first."""
    scored = [run for run in runs if run.data.tags.get("stage") in SCORED and "accuracy" in run.data.metrics]
    latest: dict[float, Run] = {}
    for run in scored:
        if run.data.tags.get("experiment") == scored[0].data.tags.get("experiment"):
            latest.setdefault(float(run.data.params.get("privacy.eps", "inf")), run)
    return [latest[eps] for eps in sorted(latest)]
