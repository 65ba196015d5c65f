"""Make a base model from an original latent-diffusion checkpoint."""

import click

from dp_lora.config import ROOT, Config
from dp_lora.errors import InputError
from entrypoints.common import Call, entry_point, relative


@entry_point("import_base")
def main(call: Call) -> None:
    """Convert the checkpoint of `checkpoint.folder` to a model folder, once; the file is read as data, never run."""
    folder_name = call.config.checkpoint.folder
    if folder_name is None:
        raise InputError(
            f"checkpoint.folder: null, so config={call.config.experiment.name} imports nothing; take config=cin256"
        )
    if call.dry_run:
        call.print_dry_run({}, [relative(call.out) if call.out else "runs/RUN_ID/base"])
        return
    from dp_lora.models.folder import save_model
    from dp_lora.models.importing import find_checkpoint, import_model

    with call.tracked() as (run, folder):
        path, digest = find_checkpoint(ROOT / folder_name, how_to_get(call.config))
        run.dataset(call.config.experiment.name, path, digest, context="import")
        out = folder if call.child else folder / "base"
        run.output(out)
        model = import_model(path, call.config, digest)
        save_model(out, model.unet, model.vae, model.scheduler, model.class_embedding, model.info)
        for name, network in (("unet", model.unet), ("vae", model.vae)):
            run.metric(f"{name}_parameters", sum(parameter.numel() for parameter in network.parameters()))
        run.metric("class_embedding_parameters", model.class_embedding.numel())
        click.echo(f"{relative(out)}: {len(model.classes)} classes, from {relative(path)}")


def how_to_get(config: Config) -> str:
    """What to type where the checkpoint is missing or damaged."""
    return (
        f"type `mlflow run . -b native -e prepare -P config={config.experiment.name}`, or "
        f"`dvc pull {config.checkpoint.folder}`"
    )


if __name__ == "__main__":
    main()
