"""How an experiment opens in the UI: on MLflow's model-training pages, with a saved view of privacy and utility.

MLflow keeps both as tags of the experiment. They name metrics and pictures, and hold no value of any run.
"""

import base64
import json
import zlib
from collections.abc import Collection
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

KIND = "mlflow.experimentKind"  # the tag by which the UI lists experiments of training and of agents
TRAINING = "custom_model_development"
PAGES = "workflowType=machine_learning"  # in an address: the pages of training; MLflow's default: those of agents
KEY = "dp-lora"  # the view's name in its address
VIEW = f"mlflow.sharedViewState.{KEY}"
TITLE = "Privacy and utility"  # in the UI's list of views
DISTANCES = ("letter_frechet_distance", "fid")  # a run has one of them
GRIDS = ("grid", "grids")  # pictures of the samples, and of samples during training
# the UI appends a chart of each other metric to these sections: folded, and behind the main charts
FOLDED = ("Model metrics", "private", "System metrics")
SHOWN = {"deleted": False, "isGenerated": False}  # a chart or a section that MLflow leaves as it is
WIDTHS = (90, 80, 60, 50, 90, 170, 90)  # pixels of the columns, in their order


def set_view(client: "MlflowClient", experiment: "Experiment", distances: Collection[str] = DISTANCES) -> bool:
    """Give an experiment its kind and its view of these distances; returns whether it has the view.

    A kind that somebody chose stays. A store that refuses tags is no error: it keeps its runs all the same.
    """
    from mlflow.exceptions import MlflowException

    wanted = {KIND: experiment.tags.get(KIND, TRAINING), VIEW: _saved(distances)}
    with suppress(MlflowException):
        for key, value in wanted.items():
            if experiment.tags.get(key) != value:
                client.set_experiment_tag(experiment.experiment_id, key, value)
        return True
    return VIEW in experiment.tags


def _saved(distances: Collection[str]) -> str:
    """The view as MLflow's own button saves it; equal distances give equal text, so that it is sent once."""
    packed = base64.b64encode(zlib.compress(json.dumps(_state(distances)).encode())).decode()
    return json.dumps({"name": TITLE, "createdAt": 0, "updatedAt": 0, "state": f"deflate;{packed}"})


def _state(distances: Collection[str]) -> dict[str, Any]:
    charts = [
        *(_scatter(metric) for metric in ("accuracy", *distances)),
        _chart("LINE", "epsilon", metricKey="epsilon", xAxisKey="step", lineSmoothness=0, useGlobalXaxisKey=False),
        *(_chart("IMAGE", name, imageKeys=[name], step=0, showRunParams=False) for name in GRIDS),
    ]
    sections: list[dict[str, Any]] = [{"uuid": KEY, "name": TITLE, "display": True, "columns": 2}]
    sections += [{"uuid": name, "name": name, "display": False} for name in FOLDED]
    columns = [f"metrics.`{name}`" for name in ("epsilon", "delta", "rank", "k", "accuracy", *distances)]
    return {
        # all runs of an adapter, also of one without an epsilon
        "searchFilter": "metrics.rank > 0",
        # sorted by start, MLflow would fold the scores below the fine-tuning that they belong to
        "orderByKey": columns[0],
        "orderByAsc": True,
        "selectedColumns": columns,
        "columnOrder": columns,
        "columnWidths": dict(zip(columns, WIDTHS, strict=False)),
        "runsHiddenMode": "SHOW_ALL",
        # hide the list of runs: beside it the charts are too narrow to be read on a small screen
        "runListHidden": True,
        "compareRunCharts": charts,
        "compareRunSections": [{"isReordered": True, **SHOWN, **section} for section in sections],
        "isAccordionReordered": True,
    }


def _scatter(metric: str) -> dict[str, Any]:
    x, y = ({"key": name, "type": "METRIC"} for name in ("epsilon", metric))
    return _chart("SCATTER", f"{metric} against epsilon", xaxis=x, yaxis=y, runsCountToCompare=100)


def _chart(kind: str, identifier: str, **settings: Any) -> dict[str, Any]:
    return {"type": kind, "uuid": identifier, "metricSectionId": KEY, **SHOWN, **settings}
