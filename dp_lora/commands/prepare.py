"""Make the datasets of an experiment in the project's one layout; downloads go to data/."""

from pathlib import Path

from dp_lora.cli.common import Call, entry_point, relative
from dp_lora.cli.early import refuse
from dp_lora.cli.pipeline import dvc, write_params
from dp_lora.cli.pipelines import (
    PICTURES,
    from_outside,
    named_pictures,
    pipeline_of,
    private_data,
    public_data,
    require,
)
from dp_lora.cli.prepared import caches, sealing
from dp_lora.config import IN_CLONE, ROOT, Config
from dp_lora.config.picture_sources import PRIVATE_SOURCES
from dp_lora.files import private_folder, whole_folder, write_json
from dp_lora.tracking import TrackedRun

SHEET = "contact_sheet.png"
PARTS = ("public", "private")


@entry_point("prepare", parts=PARTS)
def main(call: Call) -> None:
    """Prepare the experiment's public and private pictures, and the checkpoint that it starts from.

    Downloads go to data/NAME and are recorded in data.dvc. Experiments without downloads get outputs/letters/data and
    outputs/EXPERIMENT/data; on a given diffusers pipeline both lie below outputs/diffusers.
    """
    refuse(call)
    downloads = from_outside(call.config)
    if call.dry_run:
        call.print_dry_run({}, _writes(call.config))
        return
    with call.tracked() as (run, folder):
        if call.out is None and downloads:
            _bring(call.config, run)
            if IN_CLONE:
                dvc("commit", "--force", "data.dvc")
        elif call.out is None and IN_CLONE:
            pipeline = pipeline_of(call.config)
            write_params(pipeline, {"config": call.config.experiment.name, **call.typed})
            targets = [pipeline.target(stage) for stage in ("prepare_public", "prepare")]
            dvc("repro", *targets, environment=run.environment())
        else:
            for part in PARTS if call.out is None else (call.part,):
                _prepare(part, call, run, folder)


def _prepare(part: str | None, call: Call, run: TrackedRun, folder: Path) -> None:
    """Make one dataset: in `folder` for a stage that DVC started, else in its usual place."""
    from dp_lora.data.prepare import prepare_private, prepare_public

    config = call.config
    if part == "public":
        place = folder if call.child else public_data(config)
        prepare_public(config, place, run)
        _track(run, place, "letters", list(config.public.classes), private=False)
    else:
        if call.child and config.data.folder is not None:
            _name(config, folder)
            return
        place = folder if call.child else private_data(config)
        with sealing(config, place):
            prepare_private(config, place, run)
        _draw_sheet(config, place, run)
        _track(run, place, config.experiment.name, list(config.data.classes), private=True)


def _name(config: Config, folder: Path) -> None:
    """Record which pictures below data/ a pipeline takes. No stage downloads: data.dvc cannot be written meanwhile."""
    from dp_lora.data.prepare import check_prepared

    pictures = private_data(config)
    require(config, [pictures])
    check_prepared(config, pictures)
    with whole_folder(folder, private=True) as temporary:
        write_json(temporary / PICTURES, named_pictures(config))


def _writes(config: Config) -> list[str]:
    if downloads := from_outside(config):
        return [*map(relative, downloads), *(["data.dvc"] if IN_CLONE else [])]
    pipeline = pipeline_of(config)
    by_dvc = (pipeline.params, pipeline.lock, ROOT / pipeline.resolved) if IN_CLONE else ()
    return [relative(path) for path in (*by_dvc, public_data(config), private_data(config))]


def _bring(config: Config, run: TrackedRun) -> None:
    from dp_lora.data.checkpoint import prepare_checkpoint
    from dp_lora.data.prepare import prepare_private, prepare_public
    from dp_lora.data.versioned import read_source

    checkpoint, public, data = config.checkpoint, config.public, config.data
    if data.folder is not None:
        prepare_private(config, ROOT / data.folder, run)
        _draw_sheet(config, ROOT / data.folder, run)
        _track(run, ROOT / data.folder, Path(data.folder).name, list(data.classes), private=True)
    if public.folder is not None:
        prepare_public(config, ROOT / public.folder, run)
        _track(run, ROOT / public.folder, Path(public.folder).name, list(public.classes), private=False)
    if checkpoint.folder is not None:
        folder = ROOT / checkpoint.folder
        prepare_checkpoint(checkpoint, folder, run)
        source = read_source(folder) or {}
        run.dataset(folder.name, folder, source.get("sha256"), context="prepared")


def _draw_sheet(config: Config, dataset: Path, run: TrackedRun) -> None:
    """Draw a contact sheet of the operator's own pictures beside their caches; `prepared.look` removes both."""
    if not PRIVATE_SOURCES[config.data.source].own:
        return
    from dp_lora.data.contact_sheet import write_contact_sheet

    sheet = private_folder(caches(config)) / SHEET
    write_contact_sheet(dataset, list(config.data.classes), sheet)
    run.terminal(f"{relative(sheet)}: pictures as they are trained; for your eyes alone")


def _track(run: TrackedRun, folder: Path, name: str, classes: list[str], *, private: bool) -> None:
    from dp_lora.data.layout import read_dataset

    digest = None if private else read_dataset(folder, classes, "train").digest()
    run.dataset(name, folder, digest, context="prepared", private=private)
