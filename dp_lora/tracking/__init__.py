"""Record runs in MLflow, one per entry point, and find them again.

Outside this package only the project backends, which MLflow calls, and `served_model`, which it runs, import MLflow.

MLflow takes seconds to import: it is imported only when a run opens or is looked up.
"""

from dp_lora.tracking.links import ui_links
from dp_lora.tracking.lookup import download, existing_path, find_run, newest_child, resolve_input
from dp_lora.tracking.opening import run
from dp_lora.tracking.outbox import waiting_runs
from dp_lora.tracking.process import Paused, Terminated, close_orphans
from dp_lora.tracking.store import fail_joined_run, joined_run_id, shown_uri, tracking_uri
from dp_lora.tracking.tracked_run import TrackedRun
from dp_lora.tracking.upload import upload

__all__ = [
    "Paused",
    "Terminated",
    "TrackedRun",
    "close_orphans",
    "download",
    "existing_path",
    "fail_joined_run",
    "find_run",
    "joined_run_id",
    "newest_child",
    "resolve_input",
    "run",
    "shown_uri",
    "tracking_uri",
    "ui_links",
    "upload",
    "waiting_runs",
]
