"""The whole chain of an experiment, through DVC."""

import click

from dp_lora.cli.adapters import adapter_folder
from dp_lora.cli.common import Call, entry_point, relative, track_privacy
from dp_lora.cli.early import refuse
from dp_lora.cli.finetuning import KEPT, resolve
from dp_lora.cli.pipeline import is_up_to_date, repro, write_params
from dp_lora.cli.pipelines import (
    WORKING,
    base_is_named,
    from_outside,
    outputs,
    pipeline_of,
    require,
    require_distance,
    to_bring,
)
from dp_lora.cli.prepared import look
from dp_lora.config import Config, require_clone
from dp_lora.files import read_json
from dp_lora.statement import EPSILONS, read_privacy

PUBLIC_FIGURES = {"epsilon", *EPSILONS, "delta", "rank", "trainable parameters"}  # the others read private pictures


@entry_point("main")
def main(call: Call) -> None:
    """Make everything that is out of date, from pictures to scores; `dvc repro` of the config's pipeline."""
    require_clone("main")
    refuse(call)
    pipeline = pipeline_of(call.config)
    if call.dry_run:
        from dp_lora.training.dry_run_facts import finetuning_facts

        facts = finetuning_facts(resolve(call.config, remade=True, dry_run=True), samples=True)
        facts |= to_bring(call.config, scored=True)
        made = [relative(pipeline.params), relative(pipeline.lock), pipeline.resolved, *pipeline.made]
        made += [pipeline.figures] if pipeline.figures else []
        kept = [KEPT, relative(WORKING)]
        call.print_dry_run({"pipeline": pipeline.file, **facts}, [*made, relative(outputs(call.config)), *kept])
        return
    require(call.config, from_outside(call.config))
    require_distance(call.config)
    write_params(pipeline, {"config": call.config.experiment.name, **call.typed})
    # call this before DVC compares: DVC does not look into the user's own folder
    look(call.config)
    if is_up_to_date(pipeline) and base_is_named(call.config):
        click.echo("nothing to do: every stage is up to date")
    else:
        with call.tracked() as (run, _):
            run.output(outputs(call.config))
            repro(pipeline, run.environment())
            statement = read_privacy(adapter_folder(call))
            track_privacy(run, statement, call.config)
            for name, value in summary(call.config).items():
                if isinstance(value, int | float):
                    run.metric(name.replace(" ", "_"), value, private=name not in PUBLIC_FIGURES)
    show(call.config)


def summary(config: Config) -> dict[str, object]:
    """The figures of an experiment that people ask for first, from the files of its stages."""
    folder = outputs(config)
    privacy = read_json(folder / "finetune" / "metrics.json")
    scores = read_json(folder / "evaluation" / "metrics.json")
    counts = read_json(folder / "count_params" / "count_params.json")
    distance = "fid" if "fid" in scores else "letter_frechet_distance"
    figures: dict[str, object] = {}
    figures["epsilon"] = privacy.get("epsilon", "none: not private")
    figures |= {name: privacy[name] for name in EPSILONS if name in privacy}
    figures["delta"] = privacy.get("delta", "none: not private")
    figures["rank"] = config.lora.rank
    figures["trainable parameters"] = counts["trainable"]
    figures[distance] = scores[distance]
    figures[f"reconstruction_{distance}"] = scores[f"reconstruction_{distance}"]
    if "accuracy" in scores:
        figures["accuracy"] = scores["accuracy"]
    return figures


def show(config: Config) -> None:
    """Print the summary as a table, the sample grid's path, and how to open the UI."""
    click.echo()
    figures = summary(config)
    width = max(map(len, figures))
    for name, value in figures.items():
        shown = f"{value:.6g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
        click.echo(f"  {name:<{width}} {shown}")
    click.echo(f"\nsample grid:  {relative(outputs(config) / 'samples' / 'grid.png')}")
    click.echo("MLflow UI:    make ui")
