"""Send the records that a tracking server missed while it was away."""

import re
import sys

import click

from dp_lora import tracking
from dp_lora.cli.common import OneLineCommand, one_line_errors
from dp_lora.errors import InputError


@click.command(cls=OneLineCommand)
@click.argument("run_ids", nargs=-1)
def main(run_ids: tuple[str, ...]) -> None:
    """Send the records that wait in runs/outbox, of all runs or of RUN_IDS; may be stopped and typed again."""
    problems: list[str] = []
    with one_line_errors():
        for run_id in run_ids:
            if not re.fullmatch(r"[0-9a-f]{32}", run_id):
                raise InputError(f"{run_id}: not an MLflow run id (32 hex digits)")
        chosen = [run_id for run_id in tracking.waiting_runs() if not run_ids or run_id in run_ids]
        if chosen:
            problems = tracking.upload(chosen, click.echo)
        else:
            click.echo("nothing waits")
    for problem in problems:
        click.echo(f"error: {problem}", err=True)
    sys.exit(1 if problems else 0)
