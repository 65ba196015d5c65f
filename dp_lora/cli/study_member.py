"""One member of a study: its stages in a run of its own, and its scores in that run."""

from collections.abc import Sequence

import click

from dp_lora import tracking
from dp_lora.cli.adapters import find_adapter
from dp_lora.cli.common import track_privacy
from dp_lora.cli.study_upstream import inputs_of
from dp_lora.config import Config, typed_command
from dp_lora.errors import InputError
from dp_lora.files import read_json
from dp_lora.statement import read_privacy
from dp_lora.study.grid import Grid
from dp_lora.study.place import RESULTS, Place

METRICS = "metrics.json"


def make_member(grid: Grid, found: Sequence[Place], number: int) -> None:
    """Make member `number`, from 1, of a study whose base and pictures are there. InputError where it has none such."""
    from dp_lora.study.audits import auditors
    from dp_lora.study.member import run_member

    if number > len(found):
        raise InputError(f"member={number}: the study {grid.name} has {len(found)}")
    place = found[number - 1]
    inputs, audits = inputs_of([place])[place.member.config], auditors(grid, found).get(number, {})
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
    adapter = find_adapter(str(place.folder / RESULTS["finetune"]), "finetune")
    track_privacy(run, read_privacy(adapter), place.config)
    for name, value in read_json(place.folder / RESULTS["fid"] / METRICS).items():
        if isinstance(value, int | float):
            run.metric(name, value, private=True)
