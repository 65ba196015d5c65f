"""A study's members, on this machine or as jobs of Slurm, as runs under one parent; then the report."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from dp_lora import tracking
from dp_lora.cli.closed_folders import close_folders
from dp_lora.cli.common import relative
from dp_lora.cli.pipelines import from_outside, require, require_distance
from dp_lora.cli.prepared import look
from dp_lora.cli.study_upstream import (
    distinct,
    inputs_of,
    is_made_of,
    is_upstream_made,
    make_upstream,
    starts_of,
)
from dp_lora.config import typed_command
from dp_lora.errors import InputError
from dp_lora.files import exclusive, private_folder
from dp_lora.study.grid import Grid
from dp_lora.study.place import Place, study_folder
from dp_lora.study.result import DONE, Study
from dp_lora.tracking.links import ui_address

if TYPE_CHECKING:
    from dp_lora.slurm.settings import Settings
    from dp_lora.study.array import Sent
    from dp_lora.study.costs import Starts


def run_study(grid: Grid, found: Sequence[Place], jobs: int, settings: "Settings | None") -> bool:
    """Run what is not done; whether a member failed."""
    for config in distinct(found):
        require(config, from_outside(config))
        require_distance(config)
        look(config)
    folder = private_folder(study_folder(grid.name))
    try:
        with exclusive(folder / "lock"):
            return _run_alone(grid, found, jobs, settings)
    except BlockingIOError:
        raise InputError(f"study={grid.name}: another process runs it; wait for it, or stop it") from None


def _run_alone(grid: Grid, found: Sequence[Place], jobs: int, settings: "Settings | None") -> bool:
    from dp_lora.study import array

    if settings is None:
        array.refuse_beside(grid.name, found)
    again = typed_command("study", {"study": grid.name, **({"overrides": grid.overrides} if grid.overrides else {})})
    with tracking.run("study", found[0].config, command=again) as run:
        run.tags({"study": grid.name, "mlflow.runName": f"study {grid.name}"})
        sent = None if settings is None else _send(grid, found, jobs, settings, run)
        if settings is None or sent is None:
            make_upstream(grid, found, run.environment())
            starts = _begin(found, run)
            reasons = _run_members(grid, found, jobs, run)
        elif not settings.wait and sent.is_alive():
            count = sum(map(len, sent.tasks))
            click.echo(f"array {sent.array}: {count} members are in the queue; the same command gathers them later")
            return False
        else:
            with array.ends_with_caller(grid.name, sent, settings):
                array.wait_for_upstream(grid.name, sent, click.echo)
                starts = _begin(found, run)
                reasons = _run_members(grid, found, jobs, run, sent)
            array.forget(grid.name)
        _report(grid, found, starts, reasons, run)
    for number, reason in reasons.items():
        click.echo(f"{found[number - 1].member.name}: failed: {reason}", err=True)
    return bool(reasons)


def _begin(found: Sequence[Place], run: tracking.TrackedRun) -> "Starts":
    """Once base and pictures exist, close their folders to others, and say what all members cost."""
    close_folders(found[0].config)
    starts = starts_of(found)
    _describe(run, found, starts)
    return starts


def _send(
    grid: Grid, found: Sequence[Place], jobs: int, settings: "Settings", run: tracking.TrackedRun
) -> "Sent | None":
    """The array sent by an earlier call, else a new one; None if no member is left to make."""
    from dp_lora.study import array

    if sent := array.read_sent(grid.name, found):
        click.echo(f"array {sent.array}: sent by an earlier call")
        _keep_scripts(grid, run)
        return sent
    todo, upstream = found, not is_upstream_made(grid, found)
    if not upstream:
        inputs = inputs_of(found)
        todo = [place for place in found if not is_made_of(place, inputs)]
    if not todo:
        return None
    sent = array.send(grid, todo, settings, jobs, run.run_id, run.environment(), upstream=upstream)
    click.echo(f"array {sent.array}: {len(todo)} members, {jobs} at a time")
    _keep_scripts(grid, run)
    return sent


def _keep_scripts(grid: Grid, run: tracking.TrackedRun) -> None:
    """Show in the study's run what was sent; a script holds the study's own settings alone."""
    from dp_lora.study import array

    for name, text in array.scripts(grid.name).items():
        run.text(text, f"slurm/{name}.sh")


def _describe(run: tracking.TrackedRun, found: Sequence[Place], starts: "Starts") -> None:
    """Say in the study's run what all members cost; one member without a guarantee makes the whole study private."""
    from dp_lora.study.costs import privacy_lines, spent_by_all

    spent = spent_by_all(found, starts)
    lines = privacy_lines(found, starts, spent)
    for line in lines:
        run.message(line)
    plans = [start.plan for start in starts.values()]
    if spent is None or not all(plan.guaranteed for plan in plans):
        run.privacy({"private": False, "statement": "; ".join(lines)})
        return
    run.metric("epsilon_of_all", spent.epsilon)
    run.metric("delta_of_all", spent.delta)
    facts = {"epsilon": spent.epsilon, "delta": spent.delta, "unit": plans[0].unit, "relation": plans[0].relation}
    run.privacy({"private": True, **facts, "parts": plans})


def _run_members(
    grid: Grid, found: Sequence[Place], jobs: int, run: tracking.TrackedRun, sent: "Sent | None" = None
) -> dict[int, str]:
    """Make all unfinished members, or wait for those `sent`; returns the line of each failure by member number."""
    from dp_lora.study.array import follow
    from dp_lora.study.member import last_error, member_command
    from dp_lora.study.runner import Local, Task, how_it_ended, run_all
    from dp_lora.study.table import Shown

    inputs = inputs_of(found)

    def is_made(place: Place) -> bool:
        return is_made_of(place, inputs)

    todo = [place for place in found if not is_made(place)]
    if len(todo) < len(found):
        click.echo(f"{len(found) - len(todo)} of {len(found)} members are done already")
    logs = study_folder(grid.name) / "logs"
    shown = Shown(found, click.echo)
    reasons: dict[int, str] = {}

    def ended(number: int, reason: str) -> None:
        if reason:
            reasons[number] = reason
        shown.ended(number, reason)

    def ended_here(number: int, status: int) -> None:
        ended(number, (last_error(logs / f"{number}.txt") or how_it_ended(status)) if status else "")

    with shown.live():
        if sent is None:
            tasks = [Task(place.number, member_command(grid, place.number), place.release) for place in todo]
            run_all(tasks, Local(jobs, logs, run.environment()), shown.started, ended_here, shown.look)
        else:
            follow(sent, found, logs, is_made, shown.started, ended, shown.look, click.echo)
    return reasons


def _report(
    grid: Grid, found: Sequence[Place], starts: "Starts", reasons: Mapping[int, str], run: tracking.TrackedRun
) -> None:
    from dp_lora.study.audits import records_of
    from dp_lora.study.costs import spent_by_all
    from dp_lora.study.report import write_report
    from dp_lora.training.step_code import code_digest

    spent = spent_by_all(found, starts)
    outcomes = tuple(place.outcome(reason="ended early" if place.number in reasons else "") for place in found)
    study = Study(
        name=grid.name,
        title=grid.title,
        outcomes=outcomes,
        epsilon_of_all=None if spent is None else spent.epsilon,
        delta_of_all=None if spent is None else spent.delta,
        audits=tuple(records_of(starts.values(), code_digest())),
        ui=ui_address(),
        experiment_id=run.experiment_id,
    )
    folder = study_folder(grid.name) / "report"
    write_report(study, folder)
    run.artifact(folder, private=True)
    run.output(folder)
    click.echo(f"{sum(outcome.state == DONE for outcome in outcomes)} of {len(found)} members are done")
    click.echo(f"report, with scores that are yours alone: {relative(folder)}")
