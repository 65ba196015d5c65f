"""A pipeline of diffusers from the Hugging Face Hub -> a folder below data/: safetensors and texts of one revision."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dp_lora.data.hub import endpoint, hub_errors
from dp_lora.data.versioned import check_space, gigabytes, read_source, unfinished, write_source
from dp_lora.errors import InputError
from dp_lora.events import Events
from dp_lora.files import publish
from dp_lora.models.pipeline_index import INDEX, LEFT_OUT, family_of, part_config, pipeline_digest, read_index

WEIGHTS = ".safetensors"
TEXTS = (".json", ".txt", ".model")  # configs, vocabularies, and the tables of sentencepiece
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".pkl")


def fetch_base(repo: str, revision: str, folder: Path, events: Events) -> str:
    """Fill `folder` with the pipeline `repo` at `revision` (40 hex digits) and source.json; returns its digest.

    It is filled whole or not at all, and read once for the digest, the `pipeline_digest` that source.json keeps.

    An existing folder needs no network. Small files come first, so that a pipeline which cannot be fine-tuned is
    refused before its weights are downloaded; an interrupted download resumes. HF_ENDPOINT, HF_TOKEN and
    HF_HUB_OFFLINE count. Raises InputError, one line.
    """
    recorded = read_source(folder)
    if recorded is not None and (recorded.get("origin"), recorded.get("revision")) == (repo, revision):
        events.message(f"{folder}: there, {repo} at {revision}")
        return pipeline_digest(folder)
    with unfinished(folder) as part:
        sizes = _listed(repo, revision)
        if INDEX not in sizes:
            raise InputError(f"{repo} at {revision}: holds no {INDEX}; it is no pipeline of diffusers")
        _download(repo, revision, [INDEX], part)
        components = [name for name, where in read_index(part).items() if isinstance(where, list) and where[0]]
        wanted = _wanted(repo, sizes, [name for name in components if name not in LEFT_OUT])
        small = [name for name in wanted if not name.endswith(WEIGHTS)]
        _download(repo, revision, small, part)
        part_config(part, family_of(part).part)  # refuses an unlisted class, and quantised weights
        needed = sum(sizes[name] for name in wanted if not (part / name).exists())
        free = check_space(folder, needed)
        events.message(f"{repo}: {gigabytes(needed)} to download to {folder}, {gigabytes(free)} free there")
        _download(repo, revision, wanted, part)
        built = part / "base"
        for name in [INDEX, *wanted]:
            target = built / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (part / name).replace(target)
        total = sum(path.stat().st_size for path in built.rglob("*") if path.is_file())
        digest = pipeline_digest(built)
        write_source(built, {"origin": repo, "revision": revision, "size": total, "sha256": digest})
        publish(built, folder)
    events.message(f"{folder}: {repo} at {revision}")
    return digest


def _listed(repo: str, revision: str) -> dict[str, int]:
    """The files of a repository, with their sizes in bytes."""
    from huggingface_hub import HfApi, constants

    where = f"{repo} at {revision}"
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"{where}: is not here, and HF_HUB_OFFLINE is set; unset it, or name a folder in model.base")
    with hub_errors(where, "model"):
        found: Any = HfApi(endpoint=endpoint()).model_info(repo, revision=revision, files_metadata=True)
    return {one.rfilename: int(one.size or 0) for one in found.siblings or []}


def _wanted(repo: str, listed: Iterable[str], components: list[str]) -> list[str]:
    """The files needed to load these components: texts, and weights of the plain variant."""
    wanted = []
    for component in components:
        inside = [name for name in listed if name.startswith(f"{component}/")]
        texts = [name for name in inside if name.endswith(TEXTS) and ".index." not in name]
        # a variant stands before the ending: diffusion_pytorch_model.fp16.safetensors
        weights = [name for name in inside if name.endswith(WEIGHTS) and "." not in Path(name).stem]
        indices = [name for name in inside if name.endswith(f"{WEIGHTS}.index.json") and name.count(".") == 3]
        if not weights and any(name.endswith(PICKLES) for name in inside):
            raise InputError(
                f"{repo}: {component} has pickled weights alone, which can run code; take one of safetensors"
            )
        if any(name.endswith(".py") for name in inside):
            raise InputError(f"{repo}: {component} brings code of its own, which is not run")
        wanted += sorted(texts + indices + weights)
    return wanted


def _download(repo: str, revision: str, names: list[str], folder: Path) -> None:
    from huggingface_hub import hf_hub_download

    for name in names:
        with hub_errors(f"{repo} at {revision}, {name}", "model"):
            hf_hub_download(repo, name, revision=revision, local_dir=folder, endpoint=endpoint())
