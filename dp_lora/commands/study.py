"""A grid of fine-tunings, each with its samples and scores, and one report of all."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dp_lora import tracking
from dp_lora.cli.changes import telling_changes
from dp_lora.cli.common import HELP, Call, OneLineCommand, one_line_errors, relative, track_privacy
from dp_lora.cli.early import refuse
from dp_lora.cli.finetuning import audits_path, resolve
from dp_lora.cli.house import close_house
from dp_lora.cli.pipeline import absent, bring_up_to_date, would_make
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
from dp_lora.study.grid import UPSTREAM, Grid, read_study
from dp_lora.study.place import RESULTS, Place, Record, places, study_folder
from dp_lora.study.result import DONE, Study
from dp_lora.tracking.provenance import param_text

if TYPE_CHECKING:
    from dp_lora.privacy.accounting import Spent
    from dp_lora.training.resolved import Resolved

DEFAULT = STAGES["main"].default_config  # the study of the default experiment has its name
METRICS = "metrics.json"


@click.command(name="study", cls=OneLineCommand, context_settings={"max_content_width": 120})
@click.option("--study", default="", help=f"name of a file in configs/studies/; empty: {DEFAULT}")
@click.option("--jobs", default="", help="members at a time, which share the processor's cores; empty: 1")
@click.option("--overrides", default="", help=f"of all members: {HELP['overrides']}")
@click.option("--dry-run", is_flag=True, help="list members, hours, memory and epsilon of all, touch nothing")
@click.option("--member", type=click.IntRange(min=1), hidden=True, help="make this member alone")
def main(study: str, jobs: str, overrides: str, dry_run: bool, member: int | None) -> None:
    """Run every member of a study, and go on with one that was stopped: finetune, sample and fid, then a report."""
    with one_line_errors(child=member is not None):
        if jobs and not (jobs.isascii() and jobs.isdigit() and int(jobs) >= 1):
            raise InputError(f"jobs={jobs}: must be a whole number of at least 1")
        grid = read_study(study or DEFAULT, overrides)
        found = places(grid)
        if dry_run:
            _show_plan(grid, found)
        elif member is not None:
            _make_member(grid, found, member)
        else:
            with telling_changes():
                failed = _run(grid, found, int(jobs or 1))
            sys.exit(1 if failed else 0)


def _starts(found: Sequence[Place]) -> dict[int, "Resolved"]:
    return {place.number: resolve(place.config) for place in found}


def _releases(found: Sequence[Place], starts: Mapping[int, "Resolved"]) -> "Spent | None":
    """What publishing all private members costs: each release once.

    Members that are one fine-tuning are one release; where an adapter was lost and made anew, each run counts.
    """
    from dp_lora.study.costs import spent_by

    made: dict[str, dict[str, int]] = {}
    for place in found:
        statement = place.folder / RESULTS["finetune"] / "release" / "privacy.json"
        of_release = made.setdefault(place.release, {})
        if statement.exists():
            of_release.setdefault(read_json(statement)["run_id"], place.number)
    first = {place.release: place.number for place in reversed(found)}
    numbers = [number for release, runs in made.items() for number in (runs.values() or [first[release]])]
    return spent_by([starts[number] for number in numbers])


def _show_plan(grid: Grid, found: Sequence[Place]) -> None:
    from dp_lora.models.estimate import time_text
    from dp_lora.study.costs import NO_GUARANTEE, Costs

    starts, costs = _starts(found), Costs()
    of = {place.number: costs.of(starts[place.number]) for place in found}
    click.echo(f"study: {grid.name}: {grid.title}\n")
    width = max(len(place.member.name) for place in found)
    auditors = _auditors(grid, found, starts)
    for place in found:
        start = starts[place.number]
        facts = [place.member.group, "" if start.plan.guaranteed else NO_GUARANTEE]
        facts += ["audited" if place.number in auditors else "", _state(place)]
        shown = "; ".join(fact for fact in facts if fact)
        click.echo(f"{place.number:>3}  {place.member.name:<{width}}  {time_text(of[place.number].seconds)}  ({shown})")
    click.echo(f"\nmembers: {len(found)}, each with {', '.join(RESULTS)[7:]}")
    click.echo(f"estimated total, one member at a time: {time_text(sum(cost.seconds for cost in of.values()))}")
    for basis in dict.fromkeys(cost.basis for cost in of.values()):
        click.echo(f"estimated on: {basis}")
    for line in _measured(found):
        click.echo(line)
    for memory in dict.fromkeys(cost.memory for cost in of.values()):
        numbers = [place.number for place in found if of[place.number].memory == memory]
        click.echo(f"GPU memory of members {_ranges(numbers)}: {memory}")
    for line in _privacy_lines(found, starts, _releases(found, starts)):
        click.echo(line)
    upstream = dict.fromkeys(path for place in found for path in would_make(place.config, *_needed(place.config)))
    listed = [*upstream, relative(study_folder(grid.name)), "runs/DIGEST (ledgers and checkpoints)"]
    click.echo(f"would write: {', '.join(listed)}, runs in {tracking.shown_uri()}")


def _state(place: Place) -> str:
    state = place.outcome().state
    return state if state == DONE else ""


def _measured(found: Sequence[Place]) -> list[str]:
    """What the members that are done took here, which tells more than an estimate."""
    from dp_lora.models.estimate import time_text

    records = [place.read() for place in found]
    seconds = [sum(r.seconds.values()) for p, r in zip(found, records, strict=True) if p.is_done(r)]
    if not seconds:
        return []
    mean = sum(seconds) / len(seconds)
    left = mean * (len(found) - len(seconds))
    return [f"measured here: {len(seconds)} members, {time_text(mean)} each; {time_text(left)} for those that are left"]


def _ranges(numbers: Sequence[int]) -> str:
    """Such as 1 to 3, 7."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return ", ".join(f"{group[0]} to {group[-1]}" if len(group) > 1 else f"{group[0]}" for group in groups)


def _privacy_lines(found: Sequence[Place], starts: Mapping[int, "Resolved"], spent: "Spent | None") -> list[str]:
    from dp_lora.study.costs import NO_GUARANTEE

    lines = []
    if spent is not None:
        count = sum(starts[place.number].plan.guaranteed for place in found)
        lines.append(
            f"publishing all {count} private members: epsilon {spent.epsilon:.4g} at delta {spent.delta:g}: all read "
            "the same private pictures, so they compose"
        )
    if open_ones := [place.number for place in found if not starts[place.number].plan.guaranteed]:
        lines.append(f"members {_ranges(open_ones)}: {NO_GUARANTEE}")
    return lines


def _needed(config: Config) -> list[Path]:
    """What all stages of a member read: base, private pictures, and public ones where the base is not imported."""
    public = [] if config.checkpoint.folder else [public_data(config)]
    return [*public, base_folder(config), private_data(config)]


def _auditors(grid: Grid, found: Sequence[Place], starts: Mapping[int, "Resolved"]) -> set[int]:
    """Members that audit the private step for all that have their plan, where the study asks for it."""
    first: dict[object, int] = {}
    for place in found:
        plan = starts[place.number].plan
        if plan.private and plan.target_epsilon in grid.audit:
            first.setdefault(plan, place.number)
    return set(first.values())


def _inputs(config: Config) -> dict[str, str]:
    """Of which base and private pictures a member is made. A record keeps them, and tells nobody else which."""
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
    from dp_lora.study.member import run_member

    if number > len(found):
        raise InputError(f"member={number}: the study {grid.name} has {len(found)}")
    place = found[number - 1]
    inputs, audited = _inputs(place.config), number in _auditors(grid, found, _starts(found))
    again = typed_command("study", {"study": grid.name})
    with tracking.run("main", place.config, child=True, command=again) as run:
        run.tags({"mlflow.runName": f"{grid.name}: {place.member.name}", "study": grid.name})
        run.output(place.folder)
        record = run_member(place, inputs, run, _device(place.config), audited=audited)
        _track(run, place)
    click.echo(f"{place.member.name}: {sum(record.seconds.values()):.0f} seconds")


def _device(config: Config) -> str:
    """In plain words, what the member runs on."""
    from dp_lora.models.device import pick_device

    device = pick_device(config.compute.device)
    if device.type == "cpu":
        import torch

        return f"cpu, {torch.get_num_threads()} threads"
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


def _run(grid: Grid, found: Sequence[Place], jobs: int) -> bool:
    """Run what is not done; whether a member failed."""
    configs = _distinct(found)
    for config in configs:
        refuse(Call("main", config, None, dry_run=False))
        require(config, from_outside(config))
        require_distance(config)
        look(config)
    folder = private_folder(study_folder(grid.name))
    try:
        with exclusive(folder / "lock"):
            return _run_alone(grid, found, configs, jobs)
    except BlockingIOError:
        raise InputError(f"study={grid.name}: another process runs it; wait for it, or stop it") from None


def _run_alone(grid: Grid, found: Sequence[Place], configs: Sequence[Config], jobs: int) -> bool:
    again = typed_command("study", {"study": grid.name, **({"overrides": grid.overrides} if grid.overrides else {})})
    with tracking.run("study", found[0].config, command=again) as run:
        run.tags({"study": grid.name, "mlflow.runName": f"study {grid.name}"})
        _make_upstream(grid, configs, run)
        close_house(found[0].config)
        starts = _starts(found)
        spent = _releases(found, starts)
        _describe(run, found, starts, spent)
        reasons = _run_members(grid, found, jobs, run)
        _report(grid, found, starts, reasons, run)
    for number, reason in reasons.items():
        click.echo(f"{found[number - 1].member.name}: failed: {reason}", err=True)
    return bool(reasons)


def _distinct(found: Iterable[Place]) -> list[Config]:
    """One configuration for each experiment of the members."""
    first: dict[str, Config] = {}
    for place in found:
        first.setdefault(place.member.config, place.config)
    return list(first.values())


def _make_upstream(grid: Grid, configs: Sequence[Config], run: tracking.TrackedRun) -> None:
    """Make base and pictures of all members once, by DVC, before several members would make them at once."""
    made: dict[Path, tuple[str, str]] = {}
    for config in configs:
        wanted = [path for path in _needed(config) if path not in from_outside(config)]
        if not IN_CLONE:
            require(config, wanted)
            continue
        own = pipeline_of(config).made
        values = {key: param_text(value) for key, value in flatten(config).items() if key.split(".")[0] in UPSTREAM}
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
            common = _common(grid)
            bring_up_to_date(config, {"overrides": common} if common else {}, run.environment(), *todo)


def _common(grid: Grid) -> str:
    """Settings that all members have in common, as overrides."""
    first, *others = (member.settings for member in grid.members)
    same = {key: text for key, text in first.items() if all(other.get(key) == text for other in others)}
    return " ".join(f"{key}={text}" for key, text in same.items())


def _describe(
    run: tracking.TrackedRun, found: Sequence[Place], starts: Mapping[int, "Resolved"], spent: "Spent | None"
) -> None:
    """Say in the study's run what all of it costs; a study with members without a guarantee is private as a whole."""
    lines = _privacy_lines(found, starts, spent)
    for line in lines:
        run.message(line)
    plans = [start.plan for start in starts.values()]
    if spent is None or not all(plan.guaranteed for plan in plans):
        run.privacy({"private": False, "statement": "; ".join(lines)})
        return
    parts = [None] * len(plans)
    facts = {"epsilon": spent.epsilon, "delta": spent.delta, "unit": plans[0].unit, "relation": plans[0].relation}
    run.privacy({"private": True, **facts, "parts": parts})
    for name in ("epsilon", "delta"):
        run.metric(f"{name}_of_all", facts[name])  # type: ignore[arg-type]


def _run_members(grid: Grid, found: Sequence[Place], jobs: int, run: tracking.TrackedRun) -> dict[int, str]:
    """Make all members that are not done; the line of each failure by the member's number."""
    from dp_lora.study.member import last_error, member_command
    from dp_lora.study.runner import Local, Task, how_it_ended, run_all
    from dp_lora.study.table import Shown

    inputs = {config.experiment.name: _inputs(config) for config in _distinct(found)}
    todo = [place for place in found if not _is_made(place, place.read(), inputs[place.member.config])]
    if len(todo) < len(found):
        click.echo(f"{len(found) - len(todo)} of {len(found)} members are done already")
    logs = study_folder(grid.name) / "logs"
    shown = Shown(found, click.echo)
    reasons: dict[int, str] = {}

    def ended(number: int, status: int) -> None:
        if status:
            reasons[number] = last_error(logs / f"{number}.txt") or how_it_ended(status)
        shown.ended(number, reasons.get(number, ""))

    tasks = [Task(place.number, member_command(grid, place.number), place.release) for place in todo]
    with shown.live():
        run_all(tasks, Local(jobs, logs, run.environment()), shown.started, ended, shown.look)
    return reasons


def _is_made(place: Place, record: Record, inputs: Mapping[str, str]) -> bool:
    return record.inputs == inputs and place.is_done(record)


def _report(
    grid: Grid,
    found: Sequence[Place],
    starts: Mapping[int, "Resolved"],
    reasons: Mapping[int, str],
    run: tracking.TrackedRun,
) -> None:
    from dp_lora.study.report import write_report

    spent = _releases(found, starts)
    outcomes = tuple(place.outcome(reason="ended early" if place.number in reasons else "") for place in found)
    address = tracking.tracking_uri()
    study = Study(
        name=grid.name,
        title=grid.title,
        outcomes=outcomes,
        epsilon_of_all=None if spent is None else spent.epsilon,
        delta_of_all=None if spent is None else spent.delta,
        audits=tuple(_audits(starts)),
        tracking_uri=address if address.startswith("http") else "",
        experiment_id=run.experiment_id,
    )
    folder = study_folder(grid.name) / "report"
    write_report(study, folder)
    run.artifact(folder, private=True)
    run.output(folder)
    click.echo(f"{sum(outcome.state == DONE for outcome in outcomes)} of {len(found)} members are done")
    click.echo(f"report, with scores that are yours alone: {relative(folder)}")


def _audits(starts: Mapping[int, "Resolved"]) -> list[Mapping[str, object]]:
    """The records of audits of the members' plans, each once."""
    from dp_lora.privacy.audit_record import audits_of
    from dp_lora.training.run_folder import code_digest

    code = code_digest()
    found: dict[str, Mapping[str, object]] = {}
    for start in starts.values():
        for record in audits_of(audits_path(start.config), start.plan, code):
            found.setdefault(digest_value(record), record)
    return list(found.values())
