"""A pipeline of diffusers from the Hugging Face Hub -> a folder below data/: safetensors and texts of one revision."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dp_lora.data.hub import endpoint, hub_errors
from dp_lora.data.versioned import check_space, gigabytes, read_source, unfinished, write_source
from dp_lora.errors import InputError
from dp_lora.events import Events
from dp_lora.files import publish, write_json
from dp_lora.models.pipeline_index import INDEX, OUTLINE, family_of, part_config, pipeline_digest, used_parts

WEIGHTS = ".safetensors"
CONFIGS = ("config.json",)  # tokenizer_config.json too
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
        sizes = _fetch_small(repo, revision, part, TEXTS)
        needed = sum(size for name, size in sizes.items() if not (part / name).exists())
        free = check_space(folder, needed)
        events.message(f"{repo}: {gigabytes(needed)} to download to {folder}, {gigabytes(free)} free there")
        _download(repo, revision, sizes, part)
        built = part / "base"
        for name in [INDEX, *sizes]:
            target = built / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (part / name).replace(target)
        total = sum(path.stat().st_size for path in built.rglob("*") if path.is_file())
        digest = pipeline_digest(built)
        write_source(built, {"origin": repo, "revision": revision, "size": total, "sha256": digest})
        publish(built, folder)
    events.message(f"{folder}: {repo} at {revision}")
    return digest


def outline_base(repo: str, revision: str, folder: Path) -> None:
    """Fill an empty `folder` with an outline of the pipeline `repo`, to count and never to load.

    It holds the configs, and files of weights with their headers and their length, but without numbers: such a file
    takes no room on the disk. OUTLINE says the bytes to download. Raises InputError as `fetch_base` does.
    """
    sizes = _fetch_small(repo, revision, folder, CONFIGS)
    for name in sizes:
        if name.endswith(WEIGHTS):
            (folder / name).parent.mkdir(exist_ok=True)
            with (folder / name).open("wb") as file:
                header, data = _header(repo, revision, name)
                file.write(header)
                file.truncate(len(header) + data)
    write_json(folder / OUTLINE, {"bytes": sum(sizes.values())})


def _fetch_small(repo: str, revision: str, folder: Path, endings: tuple[str, ...]) -> dict[str, int]:
    """Download the files with these endings; gives the sizes of all needed files but INDEX, in bytes.

    Raises InputError for a pipeline that cannot be fine-tuned.
    """
    sizes = _listed(repo, revision)
    if INDEX not in sizes:
        raise InputError(f"{repo} at {revision}: holds no {INDEX}; it is no pipeline of diffusers")
    _download(repo, revision, [INDEX], folder)
    wanted = _wanted(repo, sizes, used_parts(folder))
    _download(repo, revision, [name for name in wanted if name.endswith(endings)], folder)
    part_config(folder, family_of(folder).part)  # refuses an unlisted class, and quantised weights
    return {name: sizes[name] for name in wanted}


def _header(repo: str, revision: str, name: str) -> tuple[bytes, int]:
    """The head of a file of weights, as its format has it: a length in 8 bytes, then JSON; and the bytes behind it."""
    from huggingface_hub import HfApi

    with hub_errors(f"{repo} at {revision}, {name}", "model"):
        found = HfApi(endpoint=endpoint()).parse_safetensors_file_metadata(repo, name, revision=revision)
    fields = ("dtype", "shape", "data_offsets")
    tensors = {name: {field: getattr(tensor, field) for field in fields} for name, tensor in found.tensors.items()}
    text = json.dumps(tensors).encode()
    data = max((tensor.data_offsets[1] for tensor in found.tensors.values()), default=0)
    return len(text).to_bytes(8, "little") + text, data


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


def _download(repo: str, revision: str, names: Iterable[str], folder: Path) -> None:
    from huggingface_hub import hf_hub_download

    for name in names:
        with hub_errors(f"{repo} at {revision}, {name}", "model"):
            hf_hub_download(repo, name, revision=revision, local_dir=folder, endpoint=endpoint())
