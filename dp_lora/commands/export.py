"""Write base and adapter as one folder for stock diffusers."""

import click

from dp_lora.cli.adapters import adapter_folder, find_base, track_adapter
from dp_lora.cli.common import Call, entry_point, relative
from dp_lora.cli.early import refuse
from dp_lora.statement import read_privacy


@entry_point("export")
def main(call: Call) -> None:
    """Merge the adapter into its base: a folder that diffusers' from_pretrained loads, with an example that samples."""
    refuse(call)
    if call.dry_run:
        if call.inputs.get("adapter"):
            adapter_folder(call)
        call.print_dry_run({}, ["runs/RUN_ID/export, or runs/RUN_ID/not-private where the adapter is not private"])
        return
    import torch

    from dp_lora.export import NOT_STOCK, export
    from dp_lora.models.adapters import adapter_info
    from dp_lora.models.folder import load_model

    adapter = adapter_folder(call)
    statement, info = read_privacy(adapter), adapter_info(adapter)
    call = call.of_adapter(statement, info["rank"])
    with call.tracked() as (run, folder):
        out = folder / ("export" if statement["private"] else "not-private")
        track_adapter(run, adapter, info, statement, call.config)
        base = load_model(find_base(info["base"], call.config, relative(adapter)), torch.device("cpu"))
        stock = export(base, adapter, call.config.sampling, out)
        if not stock:
            run.message(f"{relative(out)}: {NOT_STOCK} load them with dp_lora.models.folder.load_model")
        # do not send the weights: a base of this kind has gigabytes
        run.artifact(out / "README.md")
        run.artifact(out / "privacy.json")
        run.output(out)
        click.echo(f"{relative(out)}: {statement['statement']}")
