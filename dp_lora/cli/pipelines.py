"""The pipelines, one per shape of experiment, and the folders that their stages share.

A config whose model.base is a pipeline of diffusers belongs to pipelines/diffusers, whatever its data.folder; any other
config belongs to the pipeline with the same checkpoint.folder, public.folder and data.folder. These folders lie below
data/; `prepare` makes them, data.dvc tracks them, and no stage writes to them.
"""

import functools
import tempfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dp_lora.config import IN_CLONE, PROJECT, ROOT, Config, relative, require_clone, typed_command
from dp_lora.data.versioned import SOURCE
from dp_lora.errors import InputError
from dp_lora.files import digest_file, read_json
from dp_lora.models.driver import driver_is_there, no_gpu
from dp_lora.models.pipeline_index import is_pipeline, pipeline_digest, pipeline_info

RUNS = PROJECT / "runs"
BASE = "base.json"
PICTURES = "pictures.json"
# unfinished work and caches: outside of every DVC output, safe to delete
WORKING = ROOT / RUNS.name / "working"


@dataclass(frozen=True)
class Pipeline:
    """A dvc.yaml, with its params.yaml and dvc.lock beside it; all paths are relative to the project's root."""

    name: str
    file: str
    resolved: str  # file that its first stage writes
    made: Mapping[str, str]  # folders that its experiments share, and the stage that makes each
    checkpoint: str | None = None
    public: str | None = None
    private: str | None = None  # None: a stage makes outputs/EXPERIMENT/data
    given_base: bool = False  # whether the user supplies model.base, and a stage records which base it is

    def folder_of(self, stage: str) -> Path:
        """The shared folder that a stage makes."""
        return next(ROOT / folder for folder, maker in self.made.items() if maker == stage)

    @property
    def params(self) -> Path:
        return (ROOT / self.file).with_name("params.yaml")

    @property
    def lock(self) -> Path:
        return (ROOT / self.file).with_name("dvc.lock")

    @property
    def folders(self) -> tuple[str | None, str | None, str | None]:
        return self.checkpoint, self.public, self.private

    @property
    def figures(self) -> str | None:
        """The file that names the pipeline's metrics and plots; None: `file` names them."""
        return None if self.file == "dvc.yaml" else (Path(self.file).parent / "figures" / "dvc.yaml").as_posix()

    def target(self, stage: str) -> str:
        """A stage as an argument of `dvc repro`."""
        return stage if self.file == "dvc.yaml" else f"{self.file}:{stage}"


PIPELINES = {
    pipeline.name: pipeline
    for pipeline in (
        Pipeline(
            "letters",
            "dvc.yaml",
            "outputs/resolved.yaml",
            made={
                "outputs/letters/data": "prepare_public",
                "outputs/letters/autoencoder": "pretrain_ae",
                "outputs/letters/ldm": "pretrain_ldm",
            },
        ),
        Pipeline(
            "celebahq",
            "pipelines/celebahq/dvc.yaml",
            "outputs/celebahq/resolved.yaml",
            made={"outputs/cin256/base": "import_base"},
            checkpoint="data/cin256",
            private="data/celebahq",
        ),
        Pipeline(
            "emnist",
            "pipelines/emnist/dvc.yaml",
            "outputs/emnist/resolved.yaml",
            made={"outputs/emnist/autoencoder": "pretrain_ae", "outputs/emnist/ldm": "pretrain_ldm"},
            public="data/emnist",
            private="data/mnist",
        ),
        Pipeline(
            "diffusers",
            "pipelines/diffusers/dvc.yaml",
            "outputs/diffusers/resolved.yaml",
            made={"outputs/diffusers/letters": "prepare_public", "outputs/diffusers/base": "import_base"},
            given_base=True,
        ),
        Pipeline(
            "emoji",
            "pipelines/emoji/dvc.yaml",
            "outputs/emoji/resolved.yaml",
            made={"outputs/emoji/autoencoder": "pretrain_ae", "outputs/emoji/ldm": "pretrain_ldm"},
            public="data/openmoji",
            private="data/twemoji",
        ),
    )
}


def outside_folders(config: Config) -> tuple[str | None, str | None, str | None]:
    """The folders below data/ that `prepare` makes: checkpoint, public pictures, private pictures; None if unused."""
    return config.checkpoint.folder, config.public.folder, config.data.folder


def pipeline_of(config: Config) -> Pipeline:
    """The pipeline that a config belongs to. InputError where no dvc.yaml depends on the config's folders."""
    given_base = has_given_base(config)
    checkpoint, public, private = outside_folders(config)
    # beside a given base a stage names the private pictures, so that they may lie in any folder
    wanted = (checkpoint, public, None if given_base else private)
    for pipeline in PIPELINES.values():
        if pipeline.folders == wanted and pipeline.given_base == given_base:
            return pipeline
    names = ("checkpoint.folder", "public.folder", "data.folder")
    given = ", ".join(f"{name}={folder}" for name, folder in zip(names, outside_folders(config), strict=True))
    given += " with a diffusers pipeline as model.base" if given_base else ""
    known = ", ".join(pipeline.file for pipeline in PIPELINES.values())
    raise InputError(f"config={config.experiment.name}: no pipeline depends on {given}; there are {known}")


def outputs(config: Config) -> Path:
    """Folder of an experiment's stage outputs; a given base has its own, since one config may run on both bases."""
    folder = ROOT / "outputs"
    return (folder / "diffusers" if has_given_base(config) else folder) / config.experiment.name


def private_data(config: Config) -> Path:
    """Folder of the private dataset: below data/, or made by a stage of the experiment."""
    return ROOT / config.data.folder if config.data.folder else outputs(config) / "data"


def public_data(config: Config) -> Path:
    """The public dataset that autoencoder and LDM are trained on; InputError where the base is an imported one."""
    if config.checkpoint.folder is not None:
        raise InputError(
            f"config={config.experiment.name}: its base is imported from {config.checkpoint.folder}; there are no "
            "public pictures to pretrain on"
        )
    return ROOT / config.public.folder if config.public.folder else pipeline_of(config).folder_of("prepare_public")


def autoencoder_folder(config: Config) -> Path:
    """The folder that `pretrain_ae` makes in the config's pipeline; InputError where the base comes from outside."""
    pipeline = pipeline_of(config)
    if pipeline.given_base:
        raise InputError(f"model.base={config.model.base}: has an autoencoder of its own; nothing is pretrained")
    return pipeline.folder_of("pretrain_ae")


def base_folder(config: Config) -> Path:
    """The base model's folder; model.base is relative to the project's root. A base of the Hub lies below data/."""
    model = config.model
    if model.revision is not None:
        return ROOT / "data" / f"{model.base.replace('/', '--')}-{model.revision[:12]}"
    return ROOT / model.base


def has_given_base(config: Config) -> bool:
    """Whether the base is a pipeline of diffusers from outside: of the Hub, or in a folder that no stage makes."""
    return config.model.revision is not None or (is_pipeline(base_folder(config)) and not is_made_here(config))


def is_made_here(config: Config) -> bool:
    """Whether a stage makes the base's folder."""
    base = relative(base_folder(config))
    return any(base in pipeline.made for pipeline in PIPELINES.values())


def from_outside(config: Config) -> list[Path]:
    """Every folder that a config needs from outside."""
    return [ROOT / folder for folder in outside_folders(config) if folder is not None]


def named_base(config: Config, digest: str | None = None) -> dict[str, str]:
    """The base's folder, class and digest: the stages of pipelines/diffusers depend on them, not on the base itself.

    Without `digest`, reads gigabytes to compute it.
    """
    base = base_folder(config)
    return {
        "base": relative(base),
        "pipeline": pipeline_info(base)["pipeline"],
        "digest": digest or pipeline_digest(base),
    }


def named_pictures(config: Config) -> dict[str, str]:
    """The folder below data/ of the private pictures, and its digest: a stage's record, as `named_base` is."""
    folder = private_data(config)
    return {"folder": relative(folder), "digest": digest_file(folder / SOURCE)}


def base_is_named(config: Config) -> bool:
    """Whether a stage's record of a base from outside still holds; DVC does not look into that folder."""
    pipeline = pipeline_of(config)
    if not pipeline.given_base:
        return True
    noted = pipeline.folder_of("import_base") / BASE
    return noted.exists() and read_json(noted) == named_base(config)


def is_missing_from_hub(config: Config) -> bool:
    """Whether the base is a pipeline of the Hub that `import_base` has not brought."""
    return config.model.revision is not None and not base_folder(config).exists()


def _import_first(config: Config) -> str:
    """One line that says how to get a missing base of the Hub."""
    return (
        f"{relative(base_folder(config))}: missing; type the same overrides with `import_base`, which downloads "
        f"{config.model.base} at {config.model.revision}"
    )


@functools.cache
def _outline(repo: str, revision: str) -> tempfile.TemporaryDirectory[str]:
    """An outline of a pipeline of the Hub, until this process ends."""
    from dp_lora.data.hub_base import outline_base

    folder = tempfile.TemporaryDirectory(prefix="dp-lora-")
    outline_base(repo, revision, Path(folder.name))
    return folder


def base_to_read(config: Config, *, dry_run: bool) -> Path:
    """The base's folder, or at a dry run its outline where the base is of the Hub and not here yet.

    Raises InputError as `require_base`, and where the Hub cannot be reached.
    """
    if dry_run and is_missing_from_hub(config):
        return Path(_outline(config.model.base, str(config.model.revision)).name)
    require_base(config)
    return base_folder(config)


def require_base(config: Config) -> None:
    """Raise InputError for a model.base that does not exist and that no stage makes."""
    base = base_folder(config)
    if is_missing_from_hub(config):
        raise InputError(_import_first(config))
    if not base.exists() and not (IN_CLONE and relative(base) in pipeline_of(config).made):
        raise InputError(f"model.base={config.model.base}: no such folder; make it first, or name another")


def _made_by_prepare(config: Config) -> list[Path]:
    """The folders that only `prepare` makes: those below data/ and, without DVC, each dataset."""
    made = from_outside(config)
    if not IN_CLONE:
        made += [private_data(config), *([public_data(config)] if config.checkpoint.folder is None else [])]
    return made


def what_to_type(config: Config, folders: Iterable[Path]) -> str | None:
    """One line that says how to get missing `folders` that only `prepare` makes; None if none of these is missing."""
    outside = from_outside(config)
    missing = [
        relative(folder)
        for folder in folders
        if folder in _made_by_prepare(config)
        and not (folder / SOURCE if folder in outside else folder).exists()  # `prepare` writes source.json last
    ]
    if not missing:
        return None
    return (
        f"{' and '.join(missing)}: missing; type `{typed_command('prepare', {'config': config.experiment.name})}`"
        + (f" or, where a DVC remote has it, `dvc pull {' '.join(missing)}`" if IN_CLONE else "")
    )


def to_bring(config: Config, *, scored: bool = False, here: bool = True) -> dict[str, str]:
    """A dry run's line that says what to do first; empty where nothing is missing.

    `scored`: the samples are scored. `here`: this machine does the work, not a cluster's.
    """
    lines = [_import_first(config)] if is_missing_from_hub(config) else []
    found = [what_to_type(config, from_outside(config)), _lacks_distance(config) if scored else None]
    lines += [line for line in found if line is not None]
    # a plan for a larger machine is made on a small one
    lines += [no_gpu()] if here and config.compute.device == "cuda" and not driver_is_there() else []
    return {"first": "; ".join(lines)} if lines else {}


def _lacks_distance(config: Config) -> str | None:
    """One line that says what a config needs before its samples can be scored; None where it has that."""
    if config.checkpoint.folder is None or config.evaluation.inception_weights is not None:
        return None
    return (
        f"evaluation.inception_weights=null: the images of {config.experiment.name} can be scored by FID alone; "
        "set it to the path or address of a copy of inception-2015-12-05.pt"
    )


def require_distance(config: Config) -> None:
    """Raise InputError for a config that cannot be scored, before hours are spent on its training."""
    if (line := _lacks_distance(config)) is not None:
        raise InputError(line)


def require(config: Config, folders: Collection[Path]) -> None:
    """Raise InputError, which says what to type, if one of `folders` is missing and no stage will make it."""
    line = what_to_type(config, folders)
    if line is not None:
        raise InputError(line)
    if absent := [relative(folder) for folder in folders if not folder.exists()]:
        require_clone(f"{' and '.join(absent)}: missing; to make it")
