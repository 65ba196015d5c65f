"""Count the parameters of a fine-tuning."""

import click

from dp_lora.cli.common import Call, entry_point
from dp_lora.cli.early import refuse
from dp_lora.cli.pipelines import base_folder, base_to_read, is_made_here
from dp_lora.files import write_json


@entry_point("count_params")
def main(call: Call) -> None:
    """Count total, trainable, LoRA (per module kind) and embedding parameters, without making them."""
    refuse(call)
    from dp_lora.models.counting import count_parameters
    from dp_lora.models.shapes import base_shapes

    config = call.config
    # without a base that is made here the config's own networks are counted
    base = base_folder(config) if is_made_here(config) else base_to_read(config, dry_run=call.dry_run)
    counts = count_parameters(config, base_shapes(config, base))
    if call.dry_run:
        facts = {name: f"{counts[name]:,}" for name in ("total", "trainable", "lora", "class_embedding")}
        call.print_dry_run(facts, [f"{call.shown_out()}/count_params.json"])
        return
    with call.tracked() as (run, folder):
        rows = {name: value for name, value in counts.items() if isinstance(value, int | float)}
        rows |= {f"first_stage {part}": value for part, value in counts["first_stage_parts"].items()}
        rows |= {f"lora {kind}": value for kind, value in counts["lora_per_kind"].items()}
        width = max(len(name) for name in rows)
        for name, value in rows.items():
            shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
            click.echo(f"{name:<{width}}  {shown:>14}")
        for name in (
            "total",
            "unet",
            "first_stage",
            "lora",
            "lora_trained",
            "class_embedding",
            "trainable",
            "trainable_percent",
        ):
            run.metric(name, counts[name])
        for kind, number in counts["lora_per_kind"].items():
            # no slash: MLflow would give it a section of the chart page, and open the page there
            run.metric(f"lora_per_kind.{kind}", number)
        run.table({"parameters of": list(rows), "number": [float(value) for value in rows.values()]}, "count_params")
        path = folder / "count_params.json"
        write_json(path, counts)
        run.artifact(path)
