"""A grid of fine-tunings, each with its samples and scores, and one report of all."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dp_lora import tracking
from dp_lora.cli.changes import telling_changes
from dp_lora.cli.closed_folders import close_folders
from dp_lora.cli.common import HELP, Call, OneLineCommand, one_line_errors, relative, track_privacy
from dp_lora.cli.early import refuse
from dp_lora.cli.finetuning import resolve
from dp_lora.cli.pipeline import absent, are_up_to_date, bring_up_to_date, would_make
from dp_lora.cli.pipelines import (
    RUNS,
    base_folder,
    from_outside,
    pipeline_of,
    private_data,
    public_data,
    require,
    require_distance,
)
from dp_lora.cli.prepared import look
from dp_lora.config import IN_CLONE, STAGES, Config, flatten, typed_command
from dp_lora.errors import InputError
from dp_lora.files import digest_file, digest_value, exclusive, private_folder, read_json
from dp_lora.study.grid import Grid, read_study
from dp_lora.study.place import RESULTS, Place, places, study_folder
from dp_lora.study.result import DONE, Study
from dp_lora.tracking.links import ui_address
from dp_lora.tracking.process import stop_signals_raise
from dp_lora.tracking.provenance import param_text

if TYPE_CHECKING:
    from dp_lora.slurm.settings import Settings
    from dp_lora.study.array import Sent
    from dp_lora.study.costs import Starts

DEFAULT = STAGES["main"].default_config  # the default experiment's study has the same name
METRICS = "metrics.json"
SHARED = ("public", "checkpoint", "autoencoder", "ldm")  # sections that a base of ours is made of


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
        if dry_run:
            _show_plan(grid, found)
        elif member is not None:
            _make_member(grid, found, member)
        elif upstream:
            with stop_signals_raise():
                _make_upstream(grid, found, {})
        else:
            with telling_changes():
                failed = _run(grid, found, int(jobs or 1), settings)
            sys.exit(1 if failed else 0)


def _settings(slurm: str, found: Sequence[Place]) -> "Settings | None":
    if not slurm:
        return None
    from dp_lora.study.array import check_members, settings_of

    settings = settings_of(slurm)
    check_members(found, settings)
    return settings


def _starts(found: Sequence[Place]) -> "Starts":
    return {place.number: resolve(place.config, remade=True) for place in found}


def _show_plan(grid: Grid, found: Sequence[Place]) -> None:
    from dp_lora.study.costs import plan_lines

    for line in plan_lines(grid, found, _starts(found)):
        click.echo(line)
    upstream = dict.fromkeys(path for place in found for path in would_make(place.config, *_needed(place.config)))
    listed = [*upstream, relative(study_folder(grid.name)), "runs/DIGEST (ledgers and checkpoints)"]
    click.echo(f"would write: {', '.join(listed)}, runs in {tracking.shown_uri()}")


def _needed(config: Config) -> list[Path]:
    """Folders that a member's stages read: base, private pictures, and public pictures unless the base is imported."""
    public = [] if config.checkpoint.folder else [public_data(config)]
    return [*public, base_folder(config), private_data(config)]


def _inputs(config: Config) -> dict[str, str]:
    """Digests of a member's base and private pictures, for its record; they tell nobody else which pictures."""
    from dp_lora.models.info import model_digest
    from dp_lora.operator_key import keyed_digest

    base, data = base_folder(config), private_data(config)
    if missing := absent(*_needed(config)):
        raise InputError(
            f"{', '.join(map(relative, missing))}: missing; the study itself makes them, before its members"
        )
    pictures = keyed_digest(RUNS, ["study", digest_file(data / "metadata.parquet")])
    return {"base": model_digest(base), "pictures": pictures}


def _make_member(grid: Grid, found: Sequence[Place], number: int) -> None:
    from dp_lora.study.audits import auditors
    from dp_lora.study.member import run_member

    if number > len(found):
        raise InputError(f"member={number}: the study {grid.name} has {len(found)}")
    place = found[number - 1]
    inputs, audits = _inputs(place.config), auditors(grid, found).get(number, {})
    again = typed_command("study", {"study": grid.name})
    with tracking.run("main", place.config, child=True, command=again) as run:
        run.tags({"mlflow.runName": f"{grid.name}: {place.member.name}", "study": grid.name})
        run.output(place.folder)
        record = run_member(place, inputs, run, _device(place.config), audits)
        _track(run, place)
    click.echo(f"{place.member.name}: {sum(record.seconds.values()):.0f} seconds")


def _device(config: Config) -> str:
    """The device that the member runs on, in plain words."""
    from dp_lora.models.device import pick_device

    device = pick_device(config.compute.device)
    if device.type == "cpu":
        import torch

        threads = torch.get_num_threads()
        return f"cpu, {threads} thread{'s' if threads > 1 else ''}"
    from dp_lora.training.run_folder import hardware

    return hardware(device)


def _track(run: tracking.TrackedRun, place: Place) -> None:
    from dp_lora.cli.adapters import find_adapter
    from dp_lora.statement import read_privacy

    adapter = find_adapter(str(place.folder / RESULTS["finetune"]), "finetune")
    track_privacy(run, read_privacy(adapter), place.config)
    for name, value in read_json(place.folder / RESULTS["fid"] / METRICS).items():
        if isinstance(value, int | float):
            run.metric(name, value, private=True)


def _run(grid: Grid, found: Sequence[Place], jobs: int, settings: "Settings | None") -> bool:
    """Run what is not done; whether a member failed."""
    for config in _distinct(found):
        refuse(Call("main", config, None, dry_run=False))
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
            _make_upstream(grid, found, run.environment())
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
    starts = _starts(found)
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
    todo, upstream = found, not _is_upstream_made(grid, found)
    if not upstream:
        inputs = _inputs_of(found)
        todo = [place for place in found if not _is_made(place, inputs)]
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


def _distinct(found: Iterable[Place]) -> list[Config]:
    """One configuration for each experiment of the members."""
    first: dict[str, Config] = {}
    for place in found:
        first.setdefault(place.member.config, place.config)
    return list(first.values())


def _make_upstream(grid: Grid, found: Sequence[Place], environment: Mapping[str, str]) -> None:
    """Make base and pictures of all members once, by DVC: several members must not make them at once."""
    for config, folders in _upstream(found):
        bring_up_to_date(config, _common(grid), environment, *folders, tied=True)


def _is_upstream_made(grid: Grid, found: Sequence[Place]) -> bool:
    return all(are_up_to_date(config, _common(grid), *folders) for config, folders in _upstream(found))


def _upstream(found: Sequence[Place]) -> Iterator[tuple[Config, list[Path]]]:
    """The folders that DVC makes for all members, each once, with the configuration that makes them."""
    made: dict[Path, tuple[str, str]] = {}
    for config in _distinct(found):
        wanted = [path for path in _needed(config) if path not in from_outside(config)]
        if not IN_CLONE:
            require(config, wanted)
            continue
        own = pipeline_of(config).made
        values = {key: param_text(value) for key, value in flatten(config).items() if key.split(".")[0] in SHARED}
        settings = digest_value(values)
        todo = []
        for path in wanted:
            shared = relative(path) in own
            if shared and path in made:
                if made[path][1] != settings:
                    raise InputError(
                        f"{made[path][0]} and {config.experiment.name}: need different bases in {relative(path)}; "
                        "make a study of each"
                    )
                continue
            if shared or path == private_data(config):
                todo.append(path)
                made[path] = (config.experiment.name, settings)
        if todo:
            yield config, todo


def _common(grid: Grid) -> dict[str, str]:
    """Settings that all members have in common, as they would be typed."""
    first, *others = (member.settings for member in grid.members)
    same = {key: text for key, text in first.items() if all(other.get(key) == text for other in others)}
    return {"overrides": " ".join(f"{key}={text}" for key, text in same.items())} if same else {}


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

    inputs = _inputs_of(found)

    def is_made(place: Place) -> bool:
        return _is_made(place, inputs)

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


def _inputs_of(found: Sequence[Place]) -> dict[str, dict[str, str]]:
    return {config.experiment.name: _inputs(config) for config in _distinct(found)}


def _is_made(place: Place, inputs: Mapping[str, Mapping[str, str]]) -> bool:
    record = place.read()
    return record.inputs == inputs[place.member.config] and place.is_done(record)


def _report(
    grid: Grid, found: Sequence[Place], starts: "Starts", reasons: Mapping[int, str], run: tracking.TrackedRun
) -> None:
    from dp_lora.study.audits import records_of
    from dp_lora.study.costs import spent_by_all
    from dp_lora.study.report import write_report
    from dp_lora.training.run_folder import code_digest

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
