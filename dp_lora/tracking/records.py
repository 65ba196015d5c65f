"""A run's records for its store, as JSON and files: one form for sending at once and for waiting on disk.

Sending a record twice changes nothing: a sender may be killed after it sent a record and before it noted that.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Metric

DIED = "the process died without closing its run"  # the tag `error` of a run that another process closed


@dataclass(frozen=True)
class Record:
    """One message to the store. `content` is JSON-able; `path` is the file or folder of an artifact."""

    kind: Literal["values", "artifact", "dataset", "pause", "end"]
    content: Mapping[str, Any]
    path: Path | None = None


def metrics(batch: Sequence["Metric"]) -> Record:
    """Scalars."""
    # JSON has neither nan nor inf
    rows = [[metric.key, repr(float(metric.value)), metric.timestamp, metric.step] for metric in batch]
    return Record("values", {"metrics": rows})


def params(texts: Mapping[str, str]) -> Record:
    """Params."""
    return Record("values", {"params": dict(texts)})


def tags(texts: Mapping[str, str]) -> Record:
    """Tags."""
    return Record("values", {"tags": dict(texts)})


def artifact(path: Path, folder: str | None = None) -> Record:
    """A file under its own name, or the content of a folder, in the artifact folder `folder`."""
    return Record("artifact", {"folder": folder}, path)


def dataset(given: "DatasetInput") -> Record:
    """An input."""
    return Record(
        "dataset", {"dataset": given.dataset.to_dictionary(), "tags": {tag.key: tag.value for tag in given.tags}}
    )


def end(status: str) -> Record:
    """The state in which the run ends, now."""
    return Record("end", {"status": status, "end_time": time.time_ns() // 1_000_000})


def pause() -> Record:
    """The run has not ended: it waits, and goes on later."""
    return Record("pause", {})


def send(client: "MlflowClient", run_id: str, record: Record) -> None:
    """Send a record to the store. Raises the client's errors, for a server after its retries (4 minutes by default)."""
    content = record.content
    if record.kind == "values":
        _send_values(client, run_id, content)
    elif record.kind == "artifact":
        log = client.log_artifacts if record.path is not None and record.path.is_dir() else client.log_artifact
        log(run_id, str(record.path), content["folder"])
    elif record.kind == "dataset":
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [InputTag(key, value) for key, value in content["tags"].items()]
        client.log_inputs(run_id, [DatasetInput(Dataset(**content["dataset"]), inputs)])
    elif record.kind == "pause":
        client.update_run(run_id, status="SCHEDULED")
    else:
        client.set_terminated(run_id, content["status"], content["end_time"])
        # while the record waited, another process may have marked the run as died
        if client.get_run(run_id).data.tags.get("error") == DIED:
            client.delete_tag(run_id, "error")


def _send_values(client: "MlflowClient", run_id: str, content: Mapping[str, Any]) -> None:
    from mlflow.entities import Metric, Param, RunTag

    client.log_batch(
        run_id,
        metrics=[Metric(key, float(value), when, step) for key, value, when, step in content.get("metrics", ())],
        params=[Param(key, text) for key, text in content.get("params", {}).items()],
        tags=[RunTag(key, text) for key, text in content.get("tags", {}).items()],
    )


def is_refused(error: BaseException) -> bool:
    """Whether the store refuses for good, so that sending again is useless."""
    return getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE"
