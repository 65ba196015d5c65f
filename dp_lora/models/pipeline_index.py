"""What is known of a pipeline folder of diffusers without its networks, and so without torch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from dp_lora.errors import InputError, line
from dp_lora.files import digest_file, digest_folder, digest_value, read_json
from dp_lora.models.families import FAMILIES, Family

INDEX = "model_index.json"
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")  # what neither trains nor draws a picture
PADDED = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")  # a caption to what their tokenizer says: CLIP's 77


def is_pipeline(folder: Path) -> bool:
    """Whether a folder holds a pipeline of diffusers."""
    return (Path(folder) / INDEX).is_file()


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json: the pipeline's class, and the library and class of each component. InputError where damaged."""
    path = Path(folder) / INDEX
    try:
        index = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({line(error)})") from None
    if not isinstance(index, dict):
        raise InputError(f"{path}: must be an object")
    return index


def family_of(folder: Path) -> Family:
    """The family of a pipeline folder. InputError for a class that has none, or that brings code of its own."""
    named = read_index(folder).get("_class_name")
    if not isinstance(named, str) or named not in FAMILIES:
        raise InputError(f"{folder / INDEX}: pipeline class {named}: must be one of {', '.join(sorted(FAMILIES))}")
    tokenizer = folder / "tokenizer" / "tokenizer_config.json"
    tokens = read_json(tokenizer).get("model_max_length") if named in PADDED and tokenizer.is_file() else None
    return FAMILIES[named] if tokens is None else replace(FAMILIES[named], tokens=tokens)


def part_config(folder: Path, part: str) -> dict[str, Any]:
    """config.json of a component. InputError where it is missing, or its weights are quantised."""
    path = folder / part / "config.json"
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({line(error)}); the pipeline folder is not complete") from None
    if "quantization_config" in config:
        raise InputError(f"{path}: the weights are quantised; take the base's plain safetensors")
    return config


def pipeline_info(folder: Path) -> dict[str, Any]:
    """What model.json says of a model folder, of a pipeline: it states neither classes, size nor its privacy."""
    family = family_of(folder)
    part_config(folder, family.part)  # one that cannot be loaded is refused here, without torch
    return {
        "classes": [],
        "null_row": False,
        "channels": 3,
        "pipeline": family.pipeline,
        "privacy_status": "unknown",
    }


def pipeline_digest(folder: Path) -> str:
    """SHA-256 over the index and every component that is used; other files of the folder do not count."""
    used = (name for name, where in read_index(folder).items() if isinstance(where, list) and name not in LEFT_OUT)
    parts = [(name, digest_folder(folder / name)) for name in sorted(used) if (folder / name).is_dir()]
    files = [name for name in (INDEX, "model.json") if (folder / name).exists()]
    return digest_value([*((name, digest_file(folder / name)) for name in files), *parts])
