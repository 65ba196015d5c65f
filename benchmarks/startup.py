"""How long commands take before they work. `python -m benchmarks.startup` prints seconds beside the bar of each.

The least of a few calls: another process at work on the machine makes a call slower, and none faster.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click

from dp_lora.config import ROOT, STAGES

HELP, DRY_RUN, COUNT = 1.0, 4.0, 5.0  # seconds, on two cores that do nothing else


def commands() -> Iterator[tuple[list[str], float]]:
    """What is measured, as arguments of `dp-lora`, and its bar in seconds."""
    for name in STAGES:
        yield [name, "--help"], HELP
    for name in STAGES:
        yield [name, "--dry-run"], DRY_RUN
    yield ["count_params"], COUNT


def seconds(arguments: list[str], store: Path) -> float:
    """Seconds of one call at the project's root, with an MLflow store of its own. Raises where it fails."""
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{store}/mlflow.db"}
    environment.pop("MLFLOW_RUN_ID", None)
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "dp_lora", *arguments], cwd=ROOT, env=environment, capture_output=True, check=True
    )
    return time.perf_counter() - began


@click.command()
@click.option("--calls", default=3, type=click.IntRange(1), show_default=True, help="calls of each, of which the least")
def main(calls: int) -> None:
    """Print a Markdown table: command, seconds, bar. The status is 1 where one is above its bar."""
    above = False
    click.echo("| command | seconds | bar |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as store:
        for arguments, bar in commands():
            least = min(seconds(arguments, Path(store)) for _ in range(calls))
            above |= least > bar
            click.echo(f"| `dp-lora {' '.join(arguments)}` | {least:.1f} | {bar:g} |")
    sys.exit(int(above))


if __name__ == "__main__":
    main()
