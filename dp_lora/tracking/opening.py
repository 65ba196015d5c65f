"""One MLflow run around one entry point: opened or joined, described, and closed in its true state."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dp_lora.config import Config, flatten, resolved_yaml
from dp_lora.files import full_disk
from dp_lora.tracking.description import Description
from dp_lora.tracking.ending import end_status
from dp_lora.tracking.jobs import own_job_tags, settle_jobs
from dp_lora.tracking.process import close_orphans, process_tags, stop_signals_raise, stop_signals_wait
from dp_lora.tracking.provenance import environment_tags, git_tags, run_name
from dp_lora.tracking.store import (
    connect,
    experiment_id,
    first_line,
    joined_run,
    joined_run_id,
    one_line_errors,
    tracking_uri,
)
from dp_lora.tracking.tracked_run import TrackedRun

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PATIENCE = 240.0  # seconds that a stage waits for its parent's server to come back: as long as MLflow's client
MADE_UP_NAME = r"[a-z]+-[a-z]+-\d+"  # MLflow's name for a run that nobody named


@contextmanager
def run(
    stage: str, config: Config, child: bool = False, *, system_metrics: bool = False, command: str = ""
) -> Iterator[TrackedRun]:
    """Open the run of an entry point, describe it, and close it FINISHED, FAILED or KILLED.

    Started by `mlflow run` (MLFLOW_RUN_ID), it joins that run; with `child` (a stage that DVC started) it opens a
    child run below it. Otherwise it opens a new run. `command` is the command that repeats it.
    SIGTERM and SIGHUP raise Terminated while it is open. SIGUSR1 raises Paused: the run is left SCHEDULED, and the
    sender of the signal starts the same command again, which goes on in this run. Raises InputError if the store cannot
    be opened.
    """
    with stop_signals_raise():
        # the parent's server answered when the parent began: a minute without it must not cost the parent's work
        client = connect(PATIENCE if child and joined_run_id() else 0.0)
        with one_line_errors():
            close_orphans(client)
            settle_jobs(client)
            tracked = TrackedRun(client, _opened(client, stage, config, child), stage, config)
        watched = system_metrics or _asked_for_system_metrics()
        with one_line_errors():
            if watched:
                tracked.name_system_metrics()
        monitor = _monitor(tracked.run_id) if watched else None
        try:
            with one_line_errors():
                _describe(tracked, stage, config, command)
            tracked.keep_working()
            yield tracked
        except BaseException as error:
            status = end_status(error)
            if status == "SCHEDULED" and (child or joined_run_id() is None):
                # nothing goes on in this run: the next process opens another
                status = "KILLED"
            try:
                _close(tracked, monitor, status, error if status in ("FAILED", "KILLED") else None)
            except Exception as second:
                # a failure while closing the run must not hide the original exception; a full disk is told of once
                if full_disk(second) is None or full_disk(error) is None:
                    print(f"run {tracked.run_id} could not be closed: {first_line(second)}", file=sys.stderr)
            raise
        with one_line_errors():
            _close(tracked, monitor, "FINISHED", None)


def _close(tracked: TrackedRun, monitor: Any, status: str, error: BaseException | None) -> None:
    with stop_signals_wait():
        # do not wait for the monitor's thread while a server is away: MLflow's client tries for minutes
        if monitor is not None and not tracked.is_server_away():
            monitor.finish()
        tracked.close(status, error)


def _opened(client: "MlflowClient", stage: str, config: Config, child: bool) -> "Run":
    parent = joined_run(client)
    tags = process_tags() | own_job_tags()
    name = run_name(stage, config, nested=parent is not None and child)
    if parent is not None and not child:
        # keep a name that the user gave
        made_up = re.fullmatch(MADE_UP_NAME, parent.info.run_name or "")
        client.update_run(parent.info.run_id, status="RUNNING", name=name if made_up else None)
        for key, value in tags.items():
            client.set_tag(parent.info.run_id, key, value)
        if "error" in parent.data.tags:
            # left by an earlier process, whose work this one continues
            client.delete_tag(parent.info.run_id, "error")
        return parent
    from mlflow.tracking.context.registry import resolve_tags

    if parent is not None:
        tags["mlflow.parentRunId"] = parent.info.run_id
    experiment = parent.info.experiment_id if parent is not None else experiment_id(client)
    return client.create_run(experiment, tags=resolve_tags(tags), run_name=name)


def _describe(tracked: TrackedRun, stage: str, config: Config, command: str) -> None:
    code = git_tags()
    tracked.tags({"stage": stage, "experiment": config.experiment.name} | code | environment_tags())
    about, commit = config.experiment.description, code.get("mlflow.source.git.commit")
    tracked.describe(Description(stage, about, command, commit, code.get("dirty") == "true"))
    tracked.params(flatten(config))
    tracked.text(resolved_yaml(config), "config.yaml")


def _asked_for_system_metrics() -> bool:
    from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING

    return bool(MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get())


def _monitor(run_id: str) -> Any:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, tracking_uri=tracking_uri())
    monitor.start()
    return monitor
