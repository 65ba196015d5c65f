"""The default experiment at several epsilons: one table beside the runs in the MLflow UI."""

import os
import sys

import click

from dp_lora.cli.common import OneLineCommand, one_line_errors
from dp_lora.cli.pipeline import write_params
from dp_lora.cli.pipelines import PIPELINES
from dp_lora.commands.main import summary
from dp_lora.config import ROOT, STAGES, load, require_clone
from dp_lora.tracking.process import stop_signals_raise
from dp_lora.tracking.session import run_in_session

DEFAULT = STAGES["main"].default_config
EPSILONS = ("1", "5", "inf", "")  # the config's own comes last, so that outputs/ ends as `dvc repro` leaves it


@click.command(cls=OneLineCommand)
def main() -> None:
    """Run main for eps 1, 5, inf and the config's own; earlier results come from DVC's run cache."""
    with one_line_errors(), stop_signals_raise():
        require_clone("compare")
        rows = {}
        try:
            for eps in EPSILONS:
                command = [sys.executable, "-m", "dp_lora", "main", *(["--eps", eps] if eps else [])]
                status = run_in_session(command, ROOT, os.environ)
                if status:
                    sys.exit(status)
                config = load(DEFAULT, {"eps": eps})
                rows[config.privacy.eps] = summary(config)
        finally:
            write_params(PIPELINES["letters"], {"config": DEFAULT})
        click.echo()
        names = ["eps", *rows[min(rows)]]
        click.echo("| " + " | ".join(names) + " |\n|" + " --- |" * len(names))
        for eps_value in sorted(rows):
            cells = [f"{eps_value:g}"]
            cells += [f"{value:.4g}" if isinstance(value, float) else str(value) for value in rows[eps_value].values()]
            click.echo("| " + " | ".join(cells) + " |")
