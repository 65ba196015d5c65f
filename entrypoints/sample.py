"""Draw images from a base model with an adapter."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dp_lora import tracking
from dp_lora.config import ROOT, Config
from dp_lora.errors import InputError
from entrypoints.common import Call, entry_point, relative, track_privacy
from entrypoints.pipeline import WORKING
from entrypoints.pipelines import base_folder, outputs

if TYPE_CHECKING:
    from dp_lora.models.folder import Model


@entry_point("sample")
def main(call: Call) -> None:
    """Draw sampling.n images, balanced over the adapter's classes, with a grid and an archive for other tools."""
    if call.dry_run:
        from dp_lora.models.estimate import count_flops, estimate_lines, sampling_work

        facts = estimate_lines([sampling_work(call.config, count_flops(call.config, base_folder(call.config)))])
        call.print_dry_run(facts, [relative(call.out) if call.out else "runs/RUN_ID/samples"])
        return
    from dp_lora.models.adapters import adapter_info
    from dp_lora.statement import read_privacy

    adapter = adapter_folder(call)
    info, statement = adapter_info(adapter), read_privacy(adapter)
    call = call.of_adapter(statement, info["rank"])
    with call.tracked() as (run, folder):
        out = folder if call.child else folder / "samples"
        _sample(call, run, adapter, info, statement, out)
        run.artifact(out / "grid.png")
        run.artifact(out / "samples.json")
        run.output(out)
        click.echo(f"{relative(out / 'grid.png')}: {call.config.sampling.n} images")


def adapter_folder(call: Call) -> Path:
    """The adapter that `adapter` names by path or run id; empty: what the experiment's finetune stage made."""
    named = call.inputs.get("adapter", "")
    folder = tracking.resolve_input(named, "adapter") if named else outputs(call.config) / "finetune"
    for candidate in (folder, folder / "release", folder / "not-private"):
        if (candidate / "privacy.json").exists():
            return candidate
    raise InputError(
        f"adapter={named or relative(folder)}: holds no adapter; name a release/ or not-private/ folder, or the run id "
        "of a finetune run, or run `dvc repro finetune`"
    )


def track_adapter(
    run: tracking.TrackedRun, adapter: Path, info: Mapping[str, Any], statement: Mapping[str, Any], config: Config
) -> None:
    """Say in a run which adapter it works on, whose privacy that is, and link the fine-tuning that made it."""
    run.dataset("adapter", adapter, context="adapter")
    run.tags({"adapter": relative(adapter), "base": info["base"]["path"]})
    track_privacy(run, statement, config)
    run.made_from("adapter", nest=True, stage="finetune", run_id_of_adapter=statement["run_id"])


def base_of(named: Mapping[str, str], config: Config, whose: str, device: str) -> "Model":
    """The base model with this path and digest: where the path says, or at model.base; InputError for another."""
    from dp_lora.models.device import pick_device
    from dp_lora.models.folder import load_model, model_digest

    for folder in (ROOT / named["path"], base_folder(config)):
        if folder.exists() and model_digest(folder) == named["digest"]:
            return load_model(folder, pick_device(device))
    raise InputError(f"{whose}: its base {named['path']} is missing or another one; restore it, or set model.base")


def _sample(
    call: Call,
    run: tracking.TrackedRun,
    adapter: Path,
    info: Mapping[str, Any],
    statement: Mapping[str, Any],
    out: Path,
) -> None:
    from dp_lora.models.adapters import apply_adapter
    from dp_lora.sampling import sample

    config = call.config
    base = base_of(info["base"], config, relative(adapter), config.compute.device)
    track_adapter(run, adapter, info, statement, config)
    model = apply_adapter(base, adapter)
    facts = {"adapter": relative(adapter), "base": info["base"], "rank": info["rank"], "privacy": statement}
    sample(model, config, model.info["classes"], config.sampling.n, WORKING / "samples", out, run, facts)


if __name__ == "__main__":
    main()
