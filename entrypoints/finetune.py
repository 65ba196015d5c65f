"""Fine-tune the base model on private pictures under (epsilon, delta)-differential privacy."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dp_lora import tracking
from dp_lora.config import ROOT, Config
from dp_lora.errors import PRIVATE_PICTURE, InputError, private_names
from dp_lora.events import Events
from dp_lora.files import read_json, whole_file, whole_folder, write_json
from dp_lora.privacy.accounting import epsilon_of_delta, spent
from dp_lora.privacy.composition import Part, compose, parent_parts, together
from dp_lora.privacy.published import EPSILONS, claimed_epsilon
from entrypoints.common import Call, entry_point, relative, track_privacy
from entrypoints.pipeline import absent, make_missing, would_make
from entrypoints.pipelines import (
    RUNS,
    base_folder,
    from_outside,
    pipeline_of,
    private_data,
    require,
    what_to_type,
)
from entrypoints.prepared import caches, require_prepared
from entrypoints.record import LEDGER, keep_here, operator_folder
from entrypoints.sample import find_adapter, rates_at_hand, track_base

EPSILON_OF_DELTA = "epsilon_of_delta.csv"
WORK_STOPPED = "the working folder of this fine-tuning cannot be gone on with; the operator's terminal says why"
KEPT = "runs/DIGEST (ledger and checkpoints)"  # what stays of a private fine-tuning, as a dry run shows it

if TYPE_CHECKING:
    import torch

    from dp_lora.data.layout import Dataset
    from dp_lora.models.folder import Model
    from dp_lora.team import Team
    from dp_lora.training.finetune import PrivateData


@entry_point("finetune")
def main(call: Call) -> None:
    """Fine-tune LoRA weights and class embedding on the private pictures by DP-SGD."""
    base, data_folder = base_folder(call.config), private_data(call.config)
    if call.dry_run:
        _check(call.config, base)
        facts, name = planned(call.config)
        upstream = would_make(call.config, base, data_folder)
        call.print_dry_run(facts, [*upstream, KEPT, relative(caches(call.config) / "latents"), call.shown_out(name)])
        return
    require(call.config, [data_folder])
    _check(call.config, base)
    from dp_lora.launch import is_first, joined, make_fabric, started_from_outside
    from dp_lora.models.device import pick_device

    device = pick_device(call.config.compute.device)
    fabric = make_fabric(call.config.compute, device)
    if is_first(fabric):
        require_prepared(call)
    alone = call.config.compute.num_nodes == 1 and not started_from_outside(fabric)
    if not alone and (missing := absent(base, data_folder)):
        raise InputError(
            f"{', '.join(map(relative, missing))}: missing; make it with one process, before all ranks are started"
        )
    if not is_first(fabric):
        with joined(fabric, call.config.compute, device) as (team, device):
            _assist(call.config, base, data_folder, device, team)
        return
    with call.tracked() as (run, folder):
        make_missing(call.config, call.typed, run.environment(), base, data_folder)
        run.made_from("base", output=relative(base))
        run.made_from("private pictures", output=relative(data_folder))
        with joined(fabric, call.config.compute, device) as (team, device):
            result = _finetune(call, run, folder, base, data_folder, device, team)
        _report(call, run, result, base)


def _check(config: Config, base: Path) -> None:
    """Refuse what would be refused after the work upstream: targets, seed file, and the base where it is there."""
    from dp_lora.models.adapters import matched_modules, start_positions
    from dp_lora.models.counting import meta_unet
    from dp_lora.models.folder import load_info
    from dp_lora.privacy.randomness import read_secret
    from dp_lora.release import base_privacy
    from dp_lora.training.run_folder import make_plan

    if not base.exists() and relative(base) not in pipeline_of(config).made:
        raise InputError(f"model.base={config.model.base}: no such folder; make it first, or name another")
    matched_modules(meta_unet(config, base), config.lora.targets)
    if config.privacy.seed_file:
        read_secret(Path(config.privacy.seed_file))
    _named_by_resume(config)
    _parent(config)
    if base.exists():
        info = load_info(base)
        start_positions(config.train.embedding_start, info["classes"], len(config.data.classes))
        base_privacy(info, make_plan(config))
        _require_null_row(config, info["null_row"])


def _require_null_row(config: Config, there: bool) -> None:
    if config.sampling.guidance_scale != 1 and not there:
        raise InputError(
            f"sampling.guidance_scale={config.sampling.guidance_scale:g}: the base has no null row; must be 1"
        )


def _named_by_resume(config: Config) -> Path | None:
    """The working folder of the run that train.resume names; None for auto and never."""
    if config.train.resume in ("auto", "never"):
        return None
    shown = f"train.resume={config.train.resume}"
    name = tracking.find_run(config.train.resume, "train.resume")["tags"].get("mlflow.runName", "")
    kept = operator_folder(config.train.resume) / LEDGER
    if not kept.exists():
        raise InputError(f"{shown}: that run ({name}) has no ledger on this machine; name a finetune run made here")
    working = ROOT / read_json(kept)["folder"]
    if not (working / "plan.json").exists():
        raise InputError(
            f"{shown}: its working folder was not begun, or is gone: {relative(working)}",
            f"{shown}: its working folder was not begun",
        )
    return working


def _parent(config: Config) -> tuple[Part, ...]:
    """What the fine-tuning that privacy.parent names has spent, its own parents included; none where it is null."""
    from dp_lora.statement import read_privacy
    from dp_lora.training.run_folder import make_plan

    if config.privacy.parent is None:
        return ()
    statement = read_privacy(find_adapter(config.privacy.parent, "privacy.parent"))
    return parent_parts(statement, make_plan(config), f"privacy.parent={config.privacy.parent}")


def _spent_by_base(config: Config) -> tuple[Part, ...]:
    from dp_lora.models.folder import load_info, model_digest
    from dp_lora.release import base_parts
    from dp_lora.training.run_folder import make_plan

    base = base_folder(config)
    if not base.exists():
        return ()
    # a public base, as nearly all are, is not read through for its digest: a dry run is quick
    return base_parts(load_info(base), lambda: model_digest(base), make_plan(config))


def planned(config: Config, *, samples: bool = False) -> tuple[dict[str, Any], str]:
    """What a dry run prints, and the name of the folder that the adapter would go to; `samples`: their cost too."""
    from dp_lora.models.counting import count_parameters
    from dp_lora.models.estimate import count_flops, estimate_lines, finetuning_work, sampling_work
    from dp_lora.training.run_folder import NOT_PRIVATE, RELEASE, make_plan

    plan = make_plan(config)
    facts: dict[str, Any] = {
        "noise_multiplier": plan.noise_multiplier,
        "sample_rate": plan.sample_rate,
        "steps": plan.steps,
    }
    if plan.guaranteed:
        own = spent(plan, plan.steps).epsilon
        facts["expected epsilon"] = own
        if before := together(_spent_by_base(config), _parent(config)):
            total, delta = compose([*before, Part(own, plan.delta)])
            facts["expected epsilon, with what was spent before"] = f"{total:.6g} at delta {delta:.6g}"
    elif plan.private:
        facts["epsilon claimed by the released code"] = claimed_epsilon(plan, plan.steps)
        facts["epsilon bounded by the noise"] = spent(plan, plan.steps).epsilon
    base = base_folder(config)
    facts["trainable parameters"] = count_parameters(config, base)["trainable"]
    row, rates = count_flops(config, base), rates_at_hand(config, base)
    parts = finetuning_work(config, row, plan.steps, plan.expected_batch, rates)
    facts |= estimate_lines([*parts, *(sampling_work(config, row, rates) if samples else [])], rates)
    if first := what_to_type(config, from_outside(config)):
        facts["first"] = first
    return facts, RELEASE if plan.guaranteed else NOT_PRIVATE


def _inputs(config: Config, base: Path, data_folder: Path, device: "torch.device") -> "tuple[Model, Dataset]":
    import torch

    from dp_lora.data.layout import read_dataset
    from dp_lora.models.folder import load_model

    if config.privacy.reproducible:
        torch.use_deterministic_algorithms(True)
    with private_names(PRIVATE_PICTURE):
        dataset = read_dataset(data_folder, list(config.data.classes), "train")
    return load_model(base, device), dataset


def _encoded(
    config: Config, model: "Model", dataset: "Dataset", device: "torch.device", events: Events, team: "Team"
) -> "PrivateData":
    from dp_lora.data.latents import encode_dataset
    from dp_lora.training.finetune import PrivateData, units_of

    with private_names(PRIVATE_PICTURE):
        units = units_of(len(dataset), dataset.persons, config.privacy.unit)
        latents = encode_dataset(dataset, model.vae, caches(config) / "latents", device, 256, events, team)
        return PrivateData(latents, dataset.labels, units)


def _assist(config: Config, base: Path, data_folder: Path, device: "torch.device", team: "Team") -> None:
    """What every rank but the first does: its share of `_finetune`; it tracks, prints and writes nothing."""
    from dp_lora.models.device import pick_precision
    from dp_lora.models.folder import model_digest
    from dp_lora.training.finetune import assist
    from dp_lora.training.run_folder import binding, hardware

    model, dataset = _inputs(config, base, data_folder, device)
    bound = binding(config, dataset.digest(), model_digest(base), device.type, _parent(config))
    # gradients of two precisions or devices would differ with the rank that a unit falls to: with who else is drawn
    team.require_same((bound, pick_precision(config.compute.precision, device), hardware(device)))
    assist(config, model, _encoded(config, model, dataset, device, Events(), team), device, team)


def _finetune(
    call: Call, run: Any, folder: Path, base: Path, data_folder: Path, device: "torch.device", team: "Team"
) -> Path:
    import numpy as np

    from dp_lora.grids import write_grid
    from dp_lora.models.agreement import check_agreement
    from dp_lora.models.device import pick_precision, precision_name
    from dp_lora.models.estimate import GRID_IMAGES
    from dp_lora.models.folder import Model, model_digest
    from dp_lora.sampling import draw
    from dp_lora.training.finetune import finetune
    from dp_lora.training.run_folder import binding, hardware, of_other_data, open_run_folder, other_ledgers

    config = call.config
    model, dataset = _inputs(config, base, data_folder, device)
    if (model.info["size"], model.info["channels"]) != (config.data.size, config.data.channels):
        raise InputError(
            f"data.size={config.data.size}, data.channels={config.data.channels}: the base is for pictures of "
            f"{model.info['size']} pixels and {model.info['channels']} channels; set both so"
        )
    check_agreement(config.ldm, model.unet, model.scheduler, f"{relative(base)}'s")
    _require_null_row(config, model.null_row is not None)
    dataset.require_shape(config.data.size, config.data.channels, "data")
    # a release names no folder of this machine
    shown = relative(base) if base.resolve().is_relative_to(ROOT) else base.name
    base_names = {"path": shown, "digest": model_digest(base)}
    parent = _parent(config)
    bound = binding(config, dataset.digest(), base_names["digest"], device.type, parent)
    if ".dvc/tmp" in RUNS.as_posix():
        raise InputError(
            "finetune: DVC deletes this temporary copy, and the ledger in it; leave out --temp and --queue"
        )
    team.require_same((bound, pick_precision(config.compute.precision, device), hardware(device)))
    working = _working(call, folder, bound)
    run.dataset(config.experiment.name, data_folder, context="private training", private=True)
    track_base(run, base, base_names["digest"])
    run.tags({"base": base_names["path"], "base_digest": base_names["digest"]})
    # the folder's name follows from the data: two runs of one name would tell that theirs were the same
    keep_here(run.run_id, LEDGER, json.dumps({"folder": relative(working)}).encode())
    for line in of_other_data(RUNS, parent, bound["data"]):
        run.terminal(f"privacy.parent: was begun on other private data, and is added all the same: {line}")
    for line in other_ledgers(RUNS, working, bound["data"], parent):
        run.terminal(f"the same private data were used before; publishing both adds up (privacy.parent): {line}")

    def grid(current: Model, path: Path) -> None:
        names, each = list(config.data.classes), range(GRID_IMAGES)
        labels = [label for label in range(len(names)) for _ in each]
        images = draw(current, labels, [*each] * len(names), config.sampling, config.experiment.seed, device)
        write_grid(path, np.split(images, len(names)), names)

    with private_names(WORK_STOPPED), open_run_folder(working, config, bound) as opened:
        run.params(
            {
                "noise_multiplier": opened.plan.noise_multiplier,
                "sample_rate": opened.plan.sample_rate,
                "steps": opened.plan.steps,
                "precision": precision_name(pick_precision(config.compute.precision, device)),
                "tf32": "off",
            }
        )
        data = _encoded(config, model, dataset, device, run, team)
        result = finetune(config, model, base_names, data, opened, device, run, grid, team)
    if working != folder:
        return _copied(result, folder)
    _write_curves(result, folder)
    return result


def _working(call: Call, folder: Path, bound: dict[str, Any]) -> Path:
    """Where plan, ledger and checkpoints lie: outside of a stage's output, which DVC deletes before it runs again.

    A direct call goes on when it is typed again; a replay has one ledger wherever it is called from, so that one noise
    is never added to two sums. A run that `mlflow run` made has a folder of its own, which train.resume names.
    """
    from dp_lora.training.run_folder import working_folder

    shared = call.child or not call.joined or call.config.privacy.reproducible
    working = working_folder(RUNS, bound) if shared else folder
    named = _named_by_resume(call.config)
    if named is None:
        return working
    if call.config.privacy.reproducible and named.resolve() != working.resolve():
        raise InputError(f"train.resume={call.config.train.resume}: not this plan's; a replay has one working folder")
    return named


def _copied(result: Path, out: Path) -> Path:
    statement = read_json(result / "privacy.json")
    with whole_folder(out, private=not statement["private"]) as temporary:
        shutil.copytree(result, temporary / result.name)
        names = ("epsilon", *EPSILONS, "delta", "noise_multiplier", "sample_rate", "steps", "max_grad_norm", "k")
        write_json(temporary / "metrics.json", {name: statement[name] for name in names if name in statement})
        _write_curves(result, temporary)
    return out / result.name


def _write_curves(result: Path, folder: Path) -> None:
    for name, curve in curves(result).items():
        with whole_file(folder / name) as temporary:
            temporary.write_text(curve, encoding="utf-8")


def curves(result: Path) -> dict[str, str]:
    """CSV files of epsilon over the plan's steps, and over delta after the steps that were counted.

    What was spent before is in every point, as it is in what is stated.

    Computed from public numbers; without a guarantee the headers alone.
    """
    from dp_lora.privacy.plan import PrivacyPlan

    plan = PrivacyPlan.from_json(read_json(result.parent / "plan.json")["plan"])
    over_steps, over_delta = ["step,epsilon"], ["delta,epsilon"]
    if plan.guaranteed:
        points = sorted({max(1, round(plan.steps * part / 10)) for part in range(1, 11)})
        statement = read_json(result / "privacy.json")
        epsilon_before, delta_before = compose(Part(**part) for part in statement["parts"][:-1])
        over_steps += [f"{step},{epsilon_before + spent(plan, step).epsilon:.6g}" for step in points]
        own = epsilon_of_delta(plan, statement["steps"])
        over_delta += [f"{delta_before + delta!r},{epsilon_before + epsilon!r}" for delta, epsilon in own]
    return {"epsilon.csv": "\n".join(over_steps) + "\n", EPSILON_OF_DELTA: "\n".join(over_delta) + "\n"}


def _report(call: Call, run: Any, result: Path, base: Path) -> None:
    from dp_lora.statement import read_privacy

    statement = read_privacy(result)
    config = call.config
    track_privacy(run, statement, config, statement["steps"])
    run.tags({"statement": statement["statement"], "adapter": relative(result)})
    run.artifact(result)
    run.output(result)
    if statement["private"]:
        run.artifact(result.parent / EPSILON_OF_DELTA)
        run.register(config, result, base)
    click.echo(f"{relative(result)}: {statement['statement']}")


if __name__ == "__main__":
    main()
