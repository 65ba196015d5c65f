#!/usr/bin/env python3
"""Print the arguments that `mlflow run` adds to `docker run`, separated by blanks. MLproject's volume entry calls this.

It runs with the host's own Python, so it imports the standard library alone. `docker/run_arguments.py IMAGE`.
"""

import os
import re
import sqlite3
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import unquote, urlparse

# pass these by name alone: --env NAME=VALUE would show secrets in the list of processes
BY_NAME = (
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "HF_ENDPOINT",
    "HF_TOKEN",
    "HF_HUB_OFFLINE",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "OMP_NUM_THREADS",
)


def image_id(image: str) -> str:
    """The digest of a local image; `unknown` if docker does not know it."""
    command = ["docker", "image", "inspect", "--format", "{{.Id}}", image]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def make_artifact_folder(uri: str, run_id: str) -> None:
    """Make a run's artifact folder in a local store: Docker mounts it, and would make a missing one for root alone."""
    match = re.fullmatch(r"sqlite:///([^?]+)", uri)
    store = Path(unquote(match[1])) if match else None
    if store is None or not store.is_file():
        return
    with closing(sqlite3.connect(store)) as connection:
        found = connection.execute("SELECT artifact_uri FROM runs WHERE run_uuid = ?", (run_id,)).fetchone()
    location = urlparse(found[0] if found else "")
    if location.scheme in ("", "file") and location.path:
        Path(unquote(location.path)).mkdir(parents=True, exist_ok=True)


def arguments(image: str) -> list[str]:
    """The arguments; none of them holds a blank."""
    return [
        *("--env", f"DPLORA_IMAGE={image_id(image)}"),
        *(word for name in BY_NAME if os.environ.get(name) for word in ("--env", name)),
    ]


if __name__ == "__main__":
    # the entry point itself reports a store that it cannot read, in its own words
    with suppress(sqlite3.Error, OSError):
        make_artifact_folder(os.environ.get("MLFLOW_TRACKING_URI", ""), os.environ.get("MLFLOW_RUN_ID", ""))
    print(*arguments(sys.argv[1]))
