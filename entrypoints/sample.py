"""Draw images from a base model with an adapter."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dp_lora import tracking
from dp_lora.config import ROOT, Config
from dp_lora.errors import InputError
from entrypoints.common import Call, entry_point, relative, track_privacy
from entrypoints.pipelines import WORKING, base_folder, outputs

if TYPE_CHECKING:
    import torch

    from dp_lora.models.estimate import Rates
    from dp_lora.models.folder import Model
    from dp_lora.team import Team


@entry_point("sample")
def main(call: Call) -> None:
    """Draw sampling.n images, balanced over the adapter's classes, with a grid and an archive for other tools."""
    if call.dry_run:
        from dp_lora.models.estimate import count_flops, estimate_lines, sampling_work

        if call.inputs.get("adapter"):
            adapter_folder(call)
        base = base_folder(call.config)
        rates = rates_at_hand(call.config, base)
        facts = estimate_lines(sampling_work(call.config, count_flops(call.config, base), rates), rates)
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
            model = _model(find_base(info["base"], call.config, relative(adapter)), adapter, device)
            assist(model, call.config, model.info["classes"], call.config.sampling.n, team)
        return
    with call.tracked() as (run, folder):
        out = folder if call.child else folder / "samples"
        with joined(fabric, compute, device) as (team, device):
            _sample(call, run, adapter, info, statement, out, device, team)
        run.artifact(out / "samples.json")
        run.output(out)
        click.echo(f"{relative(out / 'grid.png')}: {call.config.sampling.n} images")


def rates_at_hand(config: Config, base: Path) -> "Rates | None":
    """What the work takes here, measured, where there are a GPU and the base model; None elsewhere."""
    import torch

    if config.compute.device == "cpu" or not torch.cuda.is_available() or not base.exists():
        return None
    from dp_lora.models.folder import load_model
    from dp_lora.training.measure import measure_rates

    device = torch.device("cuda")
    return measure_rates(config, load_model(base, device), config.privacy.batch_size * config.privacy.k, device)


def adapter_folder(call: Call) -> Path:
    """The adapter that `adapter` names by path or run id; empty: what the experiment's finetune stage made."""
    if named := call.inputs.get("adapter"):
        return find_adapter(named, "adapter")
    folder = outputs(call.config) / "finetune"
    return _adapter_in(folder, f"adapter={relative(folder)}")


def find_adapter(named: str, key: str) -> Path:
    """The folder of an adapter that a path or run id stands for; InputError, which calls it `key`, where none is.

    And where the folder of that run holds what a later run has put there: its privacy is not that run's.
    """
    folder = _adapter_in(tracking.resolve_input(named, key), f"{key}={named}")
    if tracking.existing_path(named) is None:
        from dp_lora.statement import read_privacy

        made = tracking.find_run(named, key)["tags"].get("run_id_of_adapter")
        if made not in (None, read_privacy(folder)["run_id"]):
            raise InputError(
                f"{key}={named}: {relative(folder)} holds another run's adapter by now; name a folder that holds this "
                f"run's, or the run that made that one"
            )
    return folder


def _adapter_in(folder: Path, shown: str) -> Path:
    for candidate in (folder, folder / "release", folder / "not-private"):
        if (candidate / "privacy.json").exists():
            return candidate
    raise InputError(
        f"{shown}: holds no adapter; name a release/ or not-private/ folder, or the run id of a finetune run, or "
        "run `dvc repro finetune`"
    )


def track_adapter(
    run: tracking.TrackedRun, adapter: Path, info: Mapping[str, Any], statement: Mapping[str, Any], config: Config
) -> None:
    """Say in a run which adapter it works on, whose privacy that is, and link the fine-tuning that made it."""
    run.dataset("adapter", adapter, context="adapter", private=not statement["private"])
    run.tags({"adapter": relative(adapter), "base": info["base"]["path"]})
    track_privacy(run, statement, config)
    run.made_from("adapter", nest=True, stage="finetune", run_id_of_adapter=statement["run_id"])


def find_base(named: Mapping[str, str], config: Config, whose: str) -> Path:
    """The base model with this path and digest: where the path says, or at model.base; InputError for another."""
    from dp_lora.models.folder import model_digest

    for folder in (ROOT / named["path"], base_folder(config)):
        if folder.exists() and model_digest(folder) == named["digest"]:
            return folder
    raise InputError(f"{whose}: its base {named['path']} is missing or another one; restore it, or set model.base")


def track_base(run: tracking.TrackedRun, base: Path, digest: str) -> None:
    """Record the base model with this digest as an input of a run."""
    run.dataset("base", base, digest, context="base model")


def _model(base: Path, adapter: Path, device: "torch.device") -> "Model":
    from dp_lora.models.adapters import apply_adapter
    from dp_lora.models.folder import load_model

    return apply_adapter(load_model(base, device), adapter)


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
    model = _model(base, adapter, device)
    track_adapter(run, adapter, info, statement, config)
    track_base(run, base, info["base"]["digest"])
    facts = {"adapter": relative(adapter), "base": info["base"], "rank": info["rank"], "privacy": statement}
    sample(model, config, model.info["classes"], config.sampling.n, WORKING / "samples", out, run, facts, team)


if __name__ == "__main__":
    main()
