"""Pipeline folders of diffusers as bases: whole, from safetensors and JSON alone; nothing is unpickled, nothing run."""

from pathlib import Path
from typing import Any

import torch

from dp_lora.errors import InputError
from dp_lora.files import digest_file, digest_folder, digest_value, read_json
from dp_lora.models.families import FAMILIES, Family
from dp_lora.models.pipeline_index import INDEX, read_index

LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")  # what neither trains nor draws a picture


def family_of(folder: Path) -> Family:
    """The family of a pipeline folder. InputError for a class that has none, or that brings code of its own."""
    named = read_index(folder).get("_class_name")
    if not isinstance(named, str) or named not in FAMILIES:
        raise InputError(f"{folder / INDEX}: pipeline class {named}: must be one of {', '.join(sorted(FAMILIES))}")
    return FAMILIES[named]


def part_config(folder: Path, part: str) -> dict[str, Any]:
    """config.json of a component. InputError where it is missing, or its weights are quantised."""
    path = folder / part / "config.json"
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({_line(error)}); the pipeline folder is not complete") from None
    if "quantization_config" in config:
        raise InputError(f"{path}: the weights are quantised; take the base's plain safetensors")
    return config


def load_pipeline(folder: Path, device: torch.device | str) -> tuple[Family, Any]:
    """Family and pipeline of a folder, on `device`, in evaluation mode and without gradients, float32.

    Raises InputError, one line, where something is missing, damaged, or not safetensors.
    """
    import diffusers

    family = family_of(folder)
    part_config(folder, family.part)
    index = read_index(folder)
    foreign = sorted(
        name
        for name, where in index.items()
        if isinstance(where, list) and where[0] not in ("diffusers", "transformers", None) and name not in LEFT_OUT
    )
    if foreign:
        raise InputError(f"{folder / INDEX}: {', '.join(foreign)}: brings code of its own, which is not run")
    absent: dict[str, Any] = {name: None for name in LEFT_OUT if name in index}
    if "requires_safety_checker" in index:
        absent["requires_safety_checker"] = False
    try:
        kind = getattr(diffusers, family.pipeline)
        pipe = kind.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False, **absent
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
        raise InputError(f"{folder}: cannot be read ({_line(error)})") from None
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    return family, pipe


def text_encoders(pipe: Any) -> list[torch.nn.Module]:
    """The networks that turn captions into what the denoiser takes, by their names' order."""
    return [
        part for name, part in sorted(pipe.components.items()) if name.startswith("text_encoder") and part is not None
    ]


def pipeline_info(folder: Path) -> dict[str, Any]:
    """What model.json says of a model folder, of a pipeline: it states neither classes nor its privacy."""
    family = family_of(folder)
    config = part_config(folder, family.part)
    size = int(config.get("sample_size") or 0) * _shrinks(folder)
    return {
        "classes": [],
        "null_row": False,
        "size": size,
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


def _shrinks(folder: Path) -> int:
    config = part_config(folder, "vae")
    return 2 ** (len(config.get("block_out_channels") or config["encoder_block_out_channels"]) - 1)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
