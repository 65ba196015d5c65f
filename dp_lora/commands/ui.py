"""The MLflow UI over the local store, and the pages that matter."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click

from dp_lora import tracking
from dp_lora.cli.common import OneLineCommand, one_line_errors, relative
from dp_lora.cli.pipelines import WORKING
from dp_lora.config import ROOT
from dp_lora.errors import InputError
from dp_lora.tracking.links import HOST, PORT, local_ui, ui_address
from dp_lora.tracking.process import stop_signals_raise
from dp_lora.tracking.reachable import is_server, server_problem
from dp_lora.tracking.store import connect, sqlite_path

LOG = WORKING / "ui.log"
START = 300.0  # seconds that the server has for its start


@click.command(cls=OneLineCommand)
@click.option("--port", default=PORT, type=click.IntRange(1, 65535), show_default=True, help="port on this machine")
def main(port: int) -> None:
    """Start the MLflow server on this machine alone and print what to open; Ctrl-C ends it.

    Where MLFLOW_TRACKING_URI is the address of a server, only print what to open there.
    """
    # child=True: an error of the UI must not fail the MLflow run of a project that started this command
    with one_line_errors(child=True), stop_signals_raise():
        connect()
        if is_server(tracking.tracking_uri()):
            show(ui_address())
            return
        with server(port) as (address, process):
            show(address)
            click.echo(f"\nfor other commands: export MLFLOW_TRACKING_URI={address}    Ctrl-C ends the server")
            with suppress(KeyboardInterrupt):
                process.wait()
                raise InputError(f"the server ended with status {process.returncode}; {relative(LOG)} says why")


def show(address: str) -> None:
    """Print the links that matter, the most wanted first, and the server's address."""
    links = {**tracking.ui_links(address), "MLflow UI": address}
    width = max(len(name) for name in links)
    for name, link in links.items():
        click.echo(f"{name:<{width}}  {link}")


@contextmanager
def server(port: int) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """Run an MLflow server over the local store, for this machine alone, until the block ends; its address and process.

    Raises InputError for a port in use and a server that does not come up.
    """
    _require_free(port)
    uri = tracking.tracking_uri()
    store = sqlite_path(uri)
    artifacts = (ROOT / "mlflow.db" if store is None else store).with_name("mlartifacts")
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    command += ["--artifacts-destination", str(artifacts)]
    # by the environment: a database's address may hold a password, and every user of the machine sees a command line
    environment = {**os.environ, "MLFLOW_BACKEND_STORE_URI": uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
    # without the dozen processes of MLflow's jobs, which nothing here uses
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    environment.pop("MLFLOW_TRACKING_URI", None)
    address = local_ui(port)
    LOG.parent.mkdir(parents=True, exist_ok=True)
    with LOG.open("wb") as log:
        # the server starts workers: a session of its own lets `_end` reach all of them
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _wait(address, process)
            yield address, process
        finally:
            _end(process)


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        # as the server does: a port that was closed a moment ago counts as free
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError):
            raise InputError(
                f"port {port} of {HOST} is in use or cannot be opened; end what uses it, or type `make ui PORT=5001`"
            ) from None


def _wait(address: str, process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + START
    while server_problem(address, 2.0) is not None:
        if process.poll() is not None or time.monotonic() > end:
            raise InputError(f"the MLflow server did not start: {_last_line(LOG)} ({relative(LOG)})")
        time.sleep(0.3)


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "its log is empty"


def _end(process: "subprocess.Popen[bytes]") -> None:
    for number, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
