"""Facts of a model folder without its networks: model.json, the kinds of its parts, its digest."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dp_lora.errors import InputError, line
from dp_lora.files import digest_file, digest_folder, digest_value, read_json
from dp_lora.models.pipeline_index import is_pipeline, pipeline_digest, pipeline_info

FORMAT = 1
PRIVACY_STATUSES = ("public", "private-dp", "non-private", "unknown")
UNETS = ("UNet2DConditionModel", "ResidualUNet2DConditionModel")
VAES = ("AutoencoderKL", "VQModel")


def model_info(
    *,
    classes: list[str],
    null_row: bool,
    size: int,
    channels: int,
    prediction_type: str | None,
    trained_on: dict[str, Any],
    privacy_status: str,
    seed: int,
    sections: dict[str, Any],
) -> dict[str, Any]:
    """The content of model.json. `trained_on` names the source; `sections` are the config sections it was made with.

    `prediction_type` is None for an autoencoder. Raises InputError for an unknown privacy status.
    """
    if privacy_status not in PRIVACY_STATUSES:
        raise InputError(f"privacy_status={privacy_status}: must be one of {', '.join(PRIVACY_STATUSES)}")
    return {
        "format": FORMAT,
        "classes": list(classes),
        "null_row": null_row,
        "size": size,
        "channels": channels,
        "prediction_type": prediction_type,
        "trained_on": trained_on,
        "privacy_status": privacy_status,
        "seed": seed,
        "config": sections,
    }


def load_info(folder: Path) -> dict[str, Any]:
    """model.json of a model or autoencoder folder, or its equivalent for a pipeline's."""
    path = Path(folder) / "model.json"
    if not path.exists() and is_pipeline(folder):
        return pipeline_info(folder)
    try:
        info = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({line(error)}); {folder} must be a model folder") from None
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise InputError(f"{path}: must be an object with format {FORMAT}")
    return info


def part_kind(folder: Path, kinds: Sequence[str], name: str = "config.json") -> tuple[str, dict[str, Any]]:
    """Which of `kinds` a part of a model folder is, and its config; InputError, one line, where it is none of them."""
    path = Path(folder) / name
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({line(error)}); the model folder is not complete") from None
    found = str(config.get("_class_name")) if isinstance(config, dict) else "value that is no object"
    if found not in kinds:
        raise InputError(f"{folder}: holds a {found}; must be a {' or '.join(kinds)}")
    return found, config


def model_digest(folder: Path) -> str:
    """SHA-256 over the files that define a model folder's model; pictures beside them do not count."""
    if is_pipeline(folder):
        return pipeline_digest(folder)
    parts = ["unet", "vae", "scheduler", "class_embedding.safetensors", "model.json"]
    found = [Path(folder) / name for name in parts if (Path(folder) / name).exists()]
    return digest_value([(path.name, digest_folder(path) if path.is_dir() else digest_file(path)) for path in found])
