"""model_index.json of a pipeline folder of diffusers; read without torch, so that refusals come at once."""

from pathlib import Path
from typing import Any

from dp_lora.errors import InputError
from dp_lora.files import read_json

INDEX = "model_index.json"


def is_pipeline(folder: Path) -> bool:
    """Whether a folder holds a pipeline of diffusers."""
    return (Path(folder) / INDEX).is_file()


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json: the pipeline's class, and the library and class of each component. InputError where damaged."""
    path = Path(folder) / INDEX
    try:
        index = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(index, dict):
        raise InputError(f"{path}: must be an object")
    return index
