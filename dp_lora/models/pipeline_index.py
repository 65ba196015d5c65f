"""Facts of a pipeline folder of diffusers without its networks, and so without torch."""

from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

from dp_lora.config.schema import Sampling
from dp_lora.errors import InputError, line
from dp_lora.files import digest_file, digest_folder, digest_value, read_json
from dp_lora.models.families import FAMILIES, ClassConditional, Family

INDEX = "model_index.json"
OUTLINE = "outline.json"  # a pipeline with this file has configs and the headers of its weights, but no weights
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")  # parts that neither train nor draw a picture
PADDED = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")  # pad a caption to their tokenizer's 77 (CLIP)
# sampling.attempts tells classes apart at these shares of the timesteps: below them all classes predict alike, above
# them nothing of an image is left to see
JUDGED_AT = (0.45, 0.65)


def is_pipeline(folder: Path) -> bool:
    """Whether a folder holds a pipeline of diffusers."""
    return (Path(folder) / INDEX).is_file()


def is_outline(folder: Path) -> bool:
    """Whether a pipeline's folder is an outline (`data/hub_base.outline_base`): it can be counted, and not loaded."""
    return (Path(folder) / OUTLINE).is_file()


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
    """A pipeline's equivalent of model.json: no privacy; a pipeline of captions has no classes and no size."""
    family = family_of(folder)
    config = part_config(folder, family.part)  # refuses a part that cannot be loaded, without torch
    stated: dict[str, Any] = {"channels": 3, "pipeline": family.pipeline, "privacy_status": "unknown"}
    if not isinstance(family, ClassConditional):
        return stated | {"classes": [], "null_row": False}
    halvings = len(part_config(folder, "vae")["block_out_channels"]) - 1
    size = config["sample_size"] * 2**halvings
    return stated | {"classes": family.classes(config), "null_row": True, "size": size}


def steps_and_guidance(sampling: Sampling, family: Family) -> tuple[int, float]:
    """Steps and guidance scale of drawing; where null, the defaults of the family's pipeline.

    Raises InputError for null and a model folder of ours, which has no defaults, and for attempts at prompts.
    """
    if sampling.attempts > 1 and not family.of_classes:
        raise InputError(f"sampling.attempts={sampling.attempts}: must be 1: this base draws prompts, not classes")
    found: list[Any] = []
    for key, name in (("steps", "num_inference_steps"), ("guidance_scale", "guidance_scale")):
        value = getattr(sampling, key)
        if value is None and not family.pipeline:
            raise InputError(f"sampling.{key}=null: this base is no pipeline, which has its own; set a number")
        if value is None:
            import diffusers

            value = signature(getattr(diffusers, family.pipeline).__call__).parameters[name].default
        found.append(value)
    return found[0], found[1]


def used_parts(folder: Path) -> list[str]:
    """Names of the components that train or draw; a pipeline may lack some of them, which its index says by null."""
    index = read_index(folder)
    return sorted(
        name for name, where in index.items() if isinstance(where, list) and where[0] and name not in LEFT_OUT
    )


def pipeline_digest(folder: Path) -> str:
    """SHA-256 over the index and every component that is used; other files of the folder do not count."""
    parts = [(name, digest_folder(folder / name)) for name in used_parts(folder) if (folder / name).is_dir()]
    files = [name for name in (INDEX, "model.json") if (folder / name).exists()]
    return digest_value([*((name, digest_file(folder / name)) for name in files), *parts])
