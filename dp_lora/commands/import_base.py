"""Make a base model from an original latent-diffusion checkpoint, or name a pipeline of diffusers."""

from pathlib import Path

import click

from dp_lora.cli.common import Call, entry_point, relative
from dp_lora.cli.pipeline import dvc
from dp_lora.cli.pipelines import BASE, base_folder, base_to_read, has_given_base, named_base, require, require_base
from dp_lora.config import IN_CLONE, ROOT
from dp_lora.errors import InputError
from dp_lora.files import read_json, write_json
from dp_lora.models.pipeline_index import OUTLINE


@entry_point("import_base")
def main(call: Call) -> None:
    """Bring a pipeline of the Hub (model.revision) to data/, or convert the checkpoint of checkpoint.folder, once.

    Where model.base is a pipeline's folder, that is named. Files are read as data, never run.
    """
    if has_given_base(call.config):
        _bring(call)
        return
    checkpoint = call.config.checkpoint
    if checkpoint.folder is None:
        raise InputError(
            f"checkpoint.folder: null, so config={call.config.experiment.name} imports nothing; take config=cin256"
        )
    if call.dry_run:
        call.print_dry_run({}, [call.shown_out("base")])
        return
    source = ROOT / checkpoint.folder
    require(call.config, [source])
    from dp_lora.data.checkpoint import checked_checkpoint
    from dp_lora.models.flops import count_operations
    from dp_lora.models.folder import save_model
    from dp_lora.models.importing import import_model
    from dp_lora.models.meta import meta_copies

    with call.tracked() as (run, folder):
        path, digest = checked_checkpoint(source, checkpoint)
        run.dataset(source.name, source, digest, context="import")
        out = folder if call.child else folder / "base"
        run.output(out)
        model = import_model(path, call.config, digest)
        counted = count_operations(*meta_copies(model.denoiser, model.vae))
        save_model(out, model.denoiser, model.vae, model.scheduler, model.embedded(), model.info, operations=counted)
        for name, network in (("unet", model.denoiser), ("vae", model.vae)):
            run.metric(f"{name}_parameters", sum(parameter.numel() for parameter in network.parameters()))
        run.metric("class_embedding_parameters", model.embedded().numel())
        click.echo(f"{relative(out)}: {len(model.classes)} classes, from {relative(path)}")


def _bring(call: Call) -> None:
    """Download a missing pipeline, and record folder and digest of the pipeline in use."""
    model, folder = call.config.model, base_folder(call.config)
    download = model.revision is not None and not folder.exists()
    if call.dry_run:
        new = [relative(folder), *(["data.dvc"] if IN_CLONE else [])] if download else []
        call.print_dry_run(_room(call, folder) if download else {}, [*new, call.shown_out(BASE)])
        return
    with call.tracked() as (run, out):
        digest = None
        if call.child:
            require_base(call.config)  # no stage downloads: data.dvc cannot be written while DVC runs
        elif model.revision is not None:
            from dp_lora.data.hub_base import fetch_base

            digest = fetch_base(model.base, model.revision, folder, run)
            _count(call, folder)
            if download and IN_CLONE:
                dvc("commit", "--force", "data.dvc")
        named = named_base(call.config, digest)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / BASE, named)
        run.output(out)
        run.dataset(folder.name, folder, named["digest"], context="base model")
        at = f" is {model.base} at {model.revision}" if model.revision else ""
        click.echo(f"{relative(folder)}{at}: {named['pipeline']}, SHA-256 {named['digest']}")


def _room(call: Call, folder: Path) -> dict[str, str]:
    """A dry run's line on the disk that a download needs. InputError where it has less."""
    from dp_lora.data.versioned import check_space, gigabytes

    needed = read_json(base_to_read(call.config, dry_run=True) / OUTLINE)["bytes"]
    free = check_space(folder, needed)
    return {"disk": f"{gigabytes(needed)} to download to {relative(folder)}, {gigabytes(free)} free there"}


def _count(call: Call, folder: Path) -> None:
    """Write the networks' operation counts into a pipeline's folder, so that no dry run has to build the networks."""
    from dp_lora.models.estimate import base_operations
    from dp_lora.models.operations import pipeline_key, write_operations
    from dp_lora.models.pipeline_index import family_of

    found = base_operations(call.config, folder, family_of(folder))
    write_operations(folder, found, pipeline_key(folder, call.config.data.size))
