"""Draw images from a base model with an adapter."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dp_lora import tracking
from dp_lora.cli.adapters import adapter_folder, find_base, track_adapter, track_base
from dp_lora.cli.common import Call, entry_point, relative
from dp_lora.cli.early import refuse
from dp_lora.cli.pipelines import WORKING, base_folder
from dp_lora.config import Config

if TYPE_CHECKING:
    import torch

    from dp_lora.models.folder import Model
    from dp_lora.team import Team


@entry_point("sample")
def main(call: Call) -> None:
    """Draw sampling.n images, balanced over classes or prompts, with a grid and an archive for other tools."""
    refuse(call)
    if call.dry_run:
        from dp_lora.training.costs import sampling_facts

        if call.inputs.get("adapter"):
            adapter_folder(call)
        facts = sampling_facts(call.config, base_folder(call.config))
        call.print_dry_run(facts, [relative(WORKING / "samples"), call.shown_out("samples")])
        return
    from dp_lora.launch import is_first, joined, make_fabric
    from dp_lora.models.adapters import adapter_info
    from dp_lora.models.device import pick_device
    from dp_lora.sampling import assist
    from dp_lora.statement import read_privacy

    adapter = adapter_folder(call)
    info, statement = adapter_info(adapter), read_privacy(adapter)
    call = call.of_adapter(statement, info["rank"])
    compute = call.config.compute
    device = pick_device(compute.device)
    fabric = make_fabric(compute, device)
    if not is_first(fabric):
        with joined(fabric, compute, device) as (team, device):
            model = _model(find_base(info["base"], call.config, relative(adapter)), adapter, device, call.config)
            assist(model, call.config, model.info["classes"], call.config.sampling.n, team)
        return
    with call.tracked() as (run, folder):
        out = folder if call.child else folder / "samples"
        with joined(fabric, compute, device) as (team, device):
            _sample(call, run, adapter, info, statement, out, device, team)
        run.artifact(out / "samples.json")
        run.output(out)
        click.echo(f"{relative(out / 'grid.png')}: {call.config.sampling.n} images")


def _model(base: Path, adapter: Path, device: "torch.device", config: Config) -> "Model":
    from dp_lora.models.adapters import apply_adapter, ready_to_draw
    from dp_lora.models.device import pick_precision
    from dp_lora.models.folder import load_model

    precision = pick_precision(config.sampling.precision, device, "sampling.precision")
    return ready_to_draw(apply_adapter(load_model(base, device, precision), adapter), config)


def _sample(
    call: Call,
    run: tracking.TrackedRun,
    adapter: Path,
    info: Mapping[str, Any],
    statement: Mapping[str, Any],
    out: Path,
    device: "torch.device",
    team: "Team",
) -> None:
    from dp_lora.sampling import sample

    config = call.config
    base = find_base(info["base"], config, relative(adapter))
    model = _model(base, adapter, device, config)
    track_adapter(run, adapter, info, statement, config)
    track_base(run, base, info["base"]["digest"])
    facts = {"adapter": relative(adapter), "base": info["base"], "rank": info["rank"], "privacy": statement}
    sample(model, config, model.info["classes"], config.sampling.n, WORKING / "samples", out, run, facts, team)
