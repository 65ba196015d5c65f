"""Score samples: distance to the private pictures, and what a classifier learns from the samples alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from dp_lora import tracking
from dp_lora.cli.adapters import adapter_of_samples, find_adapter, find_base, track_base
from dp_lora.cli.common import Call, entry_point, relative, track_privacy
from dp_lora.cli.early import refuse
from dp_lora.cli.figures import show_figures
from dp_lora.cli.pipeline import make_missing, would_make
from dp_lora.cli.pipelines import WORKING, outputs, private_data, public_data, require
from dp_lora.cli.prepared import caches, require_prepared
from dp_lora.config import Config
from dp_lora.errors import InputError, private_names
from dp_lora.files import read_json

PRIVATE_PICTURES = "the samples cannot be scored on the private pictures; the operator's terminal says why"


@entry_point("fid")
def main(call: Call) -> None:
    """Distances, utility and copies of a folder of samples; its scores are for the operator alone."""
    refuse(call)
    data = private_data(call.config)
    public = None if call.config.checkpoint.folder else public_data(call.config)
    needed = [data] if public is None else [public, data]
    if call.dry_run:
        if call.inputs.get("samples"):
            samples_folder(call)
        kept = [relative(folder / "evaluation") for folder in (WORKING, caches(call.config))]
        call.print_dry_run({}, [*would_make(call.config, *needed), *kept, call.shown_out("evaluation")])
        return
    samples = samples_folder(call)
    require(call.config, needed)
    require_prepared(call)
    facts = read_json(samples / "samples.json")
    call = call.of_adapter(facts["privacy"], facts["rank"])
    with call.tracked() as (run, folder):
        out = folder if call.child else folder / "evaluation"
        make_missing(call.config, call.typed, run.environment(), *needed)
        _evaluate(call, run, samples, facts, data, public, out)
        run.artifact(out, private=True)
        run.output(out)
    if call.child:
        show_figures(call.config)


def samples_folder(call: Call) -> Path:
    """The samples named by `samples` (path or run id); if empty, the output of the experiment's sample stage."""
    named = call.inputs.get("samples", "")
    folder = tracking.resolve_input(named, "samples") if named else outputs(call.config) / "samples"
    if not (folder / "samples.json").exists():
        raise InputError(
            f"samples={named or relative(folder)}: holds no samples; name a folder or run id of `sample`, or run "
            "`dvc repro sample`"
        )
    return folder


def _evaluate(
    call: Call,
    run: tracking.TrackedRun,
    samples: Path,
    facts: Mapping[str, Any],
    data: Path,
    public: Path | None,
    out: Path,
) -> None:
    from dp_lora.evaluation.evaluate import evaluate
    from dp_lora.models.adapters import untrained_class_embedding, with_embedding
    from dp_lora.models.device import pick_device
    from dp_lora.models.folder import load_model

    config = call.config
    adapters = _adapters(config, facts)
    track_privacy(run, facts["privacy"], config)
    _datasets(run, config, samples, facts["classes"], data, public, covered=facts["privacy"]["private"])
    found = find_base(facts["base"], config, relative(samples))
    track_base(run, found, facts["base"]["digest"])
    run.tags({"samples": relative(samples), "adapter": facts["adapter"], "base": facts["base"]["path"]})
    made = facts["privacy"]["run_id"]
    run.made_from("samples", nest=True, stage="sample", run_id_of_adapter=made, output=relative(samples))
    run.made_from("adapter", nest=True, stage="finetune", run_id_of_adapter=made)
    base = load_model(found, pick_device(config.compute.device))
    classes = list(config.data.classes)
    train = config.train
    untrained = None
    if base.family.of_classes:
        start = untrained_class_embedding(
            base, train.embedding_start, len(classes), train.embedding_noise, config.experiment.seed
        )
        untrained = with_embedding(base, start, classes)
    kept = (WORKING / "evaluation", caches(config) / "evaluation")
    drawn, covered = facts["classes"], facts["privacy"]["private"]
    with private_names(PRIVATE_PICTURES):
        result = evaluate(config, samples, drawn, covered, data, public, base, untrained, adapters, *kept, out, run)
    for name, value in result.metrics.items():
        run.metric(name, value, private=name in result.private)
    run.table(result.table, "evaluation", private=True)
    if result.per_class:
        run.table(result.per_class, "per_class", private=True)
    for measurement in result.measurements:
        interval = f"  ({measurement.low:.4g} to {measurement.high:.4g})" if measurement.low is not None else ""
        click.echo(f"{measurement.metric:<40} {measurement.value:>10.4g}{interval}")


def _adapters(config: Config, facts: Mapping[str, Any]) -> dict[str, Path]:
    """The adapters that are asked for their members, by the ending of their metrics' names."""
    if not config.evaluation.membership:
        return {}
    adapters = {"": adapter_of_samples(facts, "evaluation.membership=true")}
    if named := config.evaluation.membership_beside:
        from dp_lora.models.adapters import adapter_info

        beside = find_adapter(named, "evaluation.membership_beside")
        if adapter_info(beside)["base"]["digest"] != facts["base"]["digest"]:
            raise InputError(f"evaluation.membership_beside={named}: is of another base than the samples' adapter")
        adapters["_beside"] = beside
    return adapters


def _datasets(
    run: tracking.TrackedRun,
    config: Config,
    samples: Path,
    drawn: Sequence[str],
    data: Path,
    public: Path | None,
    *,
    covered: bool,
) -> None:
    from dp_lora.data.layout import read_dataset
    from dp_lora.sampling import SPLIT

    with private_names(PRIVATE_PICTURES):
        digest = read_dataset(samples, list(drawn), SPLIT).digest()
    run.dataset("samples", samples, digest, context="evaluation", private=not covered)
    if public is not None:
        digest = read_dataset(public, list(config.public.classes), "train").digest()
        run.dataset(config.public.source, public, digest, context="evaluation")
    for split in ("train", "test"):
        run.dataset(f"{config.experiment.name} {split}", data, context="private evaluation", private=True)
