"""Fine-tune the base model on private pictures under (epsilon, delta)-differential privacy."""

import shutil
from pathlib import Path
from typing import Any

import click

from dp_lora import tracking
from dp_lora.config import ROOT, Config
from dp_lora.errors import InputError
from dp_lora.files import read_json, whole_folder, write_json
from dp_lora.privacy.accounting import spent
from dp_lora.privacy.published import EPSILONS, claimed_epsilon
from entrypoints.common import Call, entry_point, relative, track_privacy
from entrypoints.pipeline import RUNS, WORKING, make_missing, would_make
from entrypoints.pipelines import base_folder, pipeline_of, private_data, require


@entry_point("finetune")
def main(call: Call) -> None:
    """Fine-tune LoRA weights and class embedding on the private pictures by DP-SGD."""
    base, data_folder = base_folder(call.config), private_data(call.config)
    if call.dry_run:
        _check(call.config, base)
        facts, name = planned(call.config)
        call.print_dry_run(facts, [*would_make(base, data_folder), f"runs/RUN_ID/{name}"])
        return
    require(call.config, [data_folder])
    _check(call.config, base)
    from dp_lora.data.prepare import check_prepared

    with call.tracked() as (run, folder):
        make_missing(call.config, call.typed, run.environment(), base, data_folder)
        check_prepared(call.config, data_folder)
        run.made_from("base", output=relative(base))
        run.made_from("private pictures", output=relative(data_folder))
        result = _finetune(call, run, folder, base, data_folder)
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
    if base.exists():
        info = load_info(base)
        start_positions(config.train.embedding_start, info["classes"], len(config.data.classes))
        base_privacy(info, make_plan(config))


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
        facts["expected epsilon"] = spent(plan, plan.steps).epsilon
    elif plan.private:
        facts["epsilon claimed by the released code"] = claimed_epsilon(plan, plan.steps)
        facts["epsilon bounded by the noise"] = spent(plan, plan.steps).pld
    base = base_folder(config)
    facts["trainable parameters"] = count_parameters(config, base)["trainable"]
    row = count_flops(config, base)
    parts = finetuning_work(config, row, plan.steps, plan.expected_batch)
    facts |= estimate_lines([*parts, *([sampling_work(config, row)] if samples else [])])
    return facts, RELEASE if plan.guaranteed else NOT_PRIVATE


def _finetune(call: Call, run: Any, folder: Path, base: Path, data_folder: Path) -> Path:
    import torch

    from dp_lora.data.latents import encode_dataset
    from dp_lora.data.layout import read_dataset
    from dp_lora.grids import write_grid
    from dp_lora.models.agreement import check_agreement
    from dp_lora.models.device import pick_device, pick_precision
    from dp_lora.models.folder import Model, load_model, model_digest
    from dp_lora.sampling import draw
    from dp_lora.training.finetune import PrivateData, finetune, units_of
    from dp_lora.training.run_folder import binding, open_run_folder, other_ledgers, working_folder

    config = call.config
    device = pick_device(config.compute.device)
    model = load_model(base, device)
    if (model.info["size"], model.info["channels"]) != (config.data.size, config.data.channels):
        raise InputError(
            f"data.size={config.data.size}, data.channels={config.data.channels}: the base is for pictures of "
            f"{model.info['size']} pixels and {model.info['channels']} channels; set both so"
        )
    check_agreement(config.ldm, model.unet, model.scheduler, f"{relative(base)}'s")
    if config.sampling.guidance_scale != 1 and model.null_row is None:
        raise InputError(
            f"sampling.guidance_scale={config.sampling.guidance_scale:g}: the base has no null row; must be 1"
        )
    dataset = read_dataset(data_folder, list(config.data.classes), "train")
    dataset.require_shape(config.data.size, config.data.channels, "data")
    # a release names no folder of this machine
    shown = relative(base) if base.resolve().is_relative_to(ROOT) else base.name
    base_names = {"path": shown, "digest": model_digest(base)}
    bound = binding(config, dataset.digest(), base_names["digest"], device.type)
    if ".dvc/tmp" in RUNS.as_posix():
        raise InputError(
            "finetune: DVC deletes this temporary copy, and the ledger in it; leave out --temp and --queue"
        )
    if config.privacy.reproducible:
        torch.use_deterministic_algorithms(True)
    # DVC deletes a stage's output before it runs again: plan, ledger and checkpoints live outside of it. A direct call
    # goes on when it is typed again; a replay has one ledger wherever it is called from, so that one noise is never
    # added to two sums. A run that `mlflow run` made has a folder of its own
    shared = call.child or not call.joined or config.privacy.reproducible
    working = working_folder(RUNS, bound) if shared else folder
    run.dataset(config.experiment.name, data_folder, dataset.digest(), context="private training", private=True)
    run.tags({"base": base_names["path"], "base_digest": base_names["digest"], "ledger": relative(working)})
    for line in other_ledgers(RUNS, working, bound["data"]):
        run.message(f"the same private data were used before; publishing both adds up: {line}")

    def grid(current: Model, path: Path) -> None:
        names = list(config.data.classes)
        labels = [label for label in range(len(names)) for _ in range(4)]
        images = draw(current, labels, list(range(4)) * len(names), config.sampling, config.experiment.seed, device)
        write_grid(path, [images[4 * row : 4 * row + 4] for row in range(len(names))], names)

    with open_run_folder(working, config, bound) as opened:
        run.params(
            {
                "noise_multiplier": opened.plan.noise_multiplier,
                "sample_rate": opened.plan.sample_rate,
                "steps": opened.plan.steps,
                "precision": str(pick_precision(config.compute.precision, device)).removeprefix("torch."),
                "tf32": "off",
            }
        )
        latents = encode_dataset(dataset, model.vae, WORKING / "latents", device, 256, run)
        units = units_of(len(dataset), dataset.persons, config.privacy.unit)
        data = PrivateData(latents, dataset.labels, units)
        result = finetune(config, model, base_names, data, opened, device, run, grid)
    return _copied(result, folder) if shared else result


def _copied(result: Path, out: Path) -> Path:
    with whole_folder(out) as temporary:
        shutil.copytree(result, temporary / result.name)
        statement = read_json(result / "privacy.json")
        names = ("epsilon", *EPSILONS, "delta", "noise_multiplier", "sample_rate", "steps", "max_grad_norm", "k")
        write_json(temporary / "metrics.json", {name: statement[name] for name in names if name in statement})
        curve = epsilon_curve(result.parent)
        (temporary / "epsilon.csv").write_text(curve, encoding="utf-8")
    return out / result.name


def epsilon_curve(working: Path) -> str:
    """CSV of epsilon over the plan's steps, from the plan in a working folder; without a guarantee the header alone."""
    from dp_lora.privacy.plan import PrivacyPlan

    plan = PrivacyPlan.from_json(read_json(working / "plan.json")["plan"])
    lines = ["step,epsilon"]
    if plan.guaranteed:
        points = sorted({max(1, round(plan.steps * part / 10)) for part in range(1, 11)})
        lines += [f"{step},{spent(plan, step).epsilon:.6g}" for step in points]
    return "\n".join(lines) + "\n"


def _report(call: Call, run: Any, result: Path, base: Path) -> None:
    from dp_lora.statement import read_privacy

    statement = read_privacy(result)
    config = call.config
    track_privacy(run, statement, config, statement["steps"])
    run.tags({"statement": statement["statement"], "adapter": relative(result)})
    run.tags({"private": "metrics under private/; digests of private data"})
    if statement["private"] or tracking.tracking_uri().startswith("sqlite:"):
        # what must not leave the house is not sent to a server
        run.artifact(result)
    run.output(result)
    if statement["private"]:
        run.register(config, result, base)
    click.echo(f"{relative(result)}: {statement['statement']}")


if __name__ == "__main__":
    main()
