"""A grid of fine-tunings, each with its samples and scores, and one report of all."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from dp_lora import tracking
from dp_lora.cli.changes import telling_changes
from dp_lora.cli.common import HELP, Call, OneLineCommand, one_line_errors, relative, require_device
from dp_lora.cli.early import refuse
from dp_lora.cli.pipeline import would_make
from dp_lora.cli.pipelines import to_bring
from dp_lora.cli.study_member import make_member
from dp_lora.cli.study_run import run_study
from dp_lora.cli.study_upstream import (
    distinct,
    make_upstream,
    needed,
    starts_of,
)
from dp_lora.config import STAGES
from dp_lora.errors import InputError
from dp_lora.study.grid import Grid, read_study
from dp_lora.study.place import Place, places, study_folder
from dp_lora.tracking.process import stop_signals_raise

if TYPE_CHECKING:
    from dp_lora.slurm.settings import Settings

DEFAULT = STAGES["main"].default_config  # the default experiment's study has the same name


@click.command(name="study", cls=OneLineCommand, context_settings={"max_content_width": 120})
@click.option("--study", default="", help=f"name of a file in configs/studies/; empty: {DEFAULT}")
@click.option("--jobs", default="", help="members at a time, which share the processor's cores; empty: 1")
@click.option("--slurm", default="", help="a backend config: members are an array of Slurm's jobs; empty: this machine")
@click.option("--overrides", default="", help=f"of all members: {HELP['overrides']}")
@click.option("--dry-run", is_flag=True, help="list members, hours, memory and epsilon of all, touch nothing")
@click.option("--member", type=click.IntRange(min=1), hidden=True, help="make this member alone")
@click.option("--upstream", is_flag=True, hidden=True, help="make base and pictures of all members alone")
def main(study: str, jobs: str, slurm: str, overrides: str, dry_run: bool, member: int | None, upstream: bool) -> None:
    """Run every member of a study, and go on with one that was stopped: finetune, sample and fid, then a report."""
    with one_line_errors(child=member is not None or upstream):
        if jobs and not (jobs.isascii() and jobs.isdigit() and int(jobs) >= 1):
            raise InputError(f"jobs={jobs}: must be a whole number of at least 1")
        grid = read_study(study or DEFAULT, overrides)
        found = places(grid)
        settings = _settings(slurm, found)
        for config in [] if member is not None or upstream else distinct(found):
            refuse(Call("main", config, None, dry_run=dry_run))
            if settings is None and not dry_run:  # Slurm's jobs run on other machines
                require_device(config)
        if dry_run:
            _show_plan(grid, found, settings)
        elif member is not None:
            make_member(grid, found, member)
        elif upstream:
            with stop_signals_raise():
                make_upstream(grid, found, {})
        else:
            with telling_changes():
                failed = run_study(grid, found, int(jobs or 1), settings)
            sys.exit(1 if failed else 0)


def _settings(slurm: str, found: Sequence[Place]) -> "Settings | None":
    if not slurm:
        return None
    from dp_lora.study.array import check_members, settings_of

    settings = settings_of(slurm)
    check_members(found, settings)
    return settings


def _show_plan(grid: Grid, found: Sequence[Place], settings: "Settings | None") -> None:
    from dp_lora.study.costs import plan_lines

    for line in plan_lines(grid, found, starts_of(found)):
        click.echo(line)
    upstream = dict.fromkeys(path for place in found for path in would_make(place.config, *needed(place.config)))
    for config in distinct(found):
        for line in to_bring(config, scored=True, here=settings is None).values():
            click.echo(f"first: {line}")
    listed = [*upstream, relative(study_folder(grid.name)), "runs/DIGEST (ledgers and checkpoints)"]
    click.echo(f"would write: {', '.join(listed)}, runs in {tracking.shown_uri()}")
