"""Reading a PyTorch Lightning checkpoint from the internet: a pickle, from which only tensors are trusted."""

import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dp_lora.errors import InputError

# beside the tensors Lightning pickles its own classes, such as the callback that wrote the file
LIGHTNING = re.compile(r"(pytorch_lightning|lightning|lightning_fabric)\.[A-Za-z_.0-9]+")


class Inert:
    """Replaces a pickled class of Lightning's: accepts any arguments and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The `state_dict` of a checkpoint: tensors on the CPU by their original names, mapped from the file.

    Read by torch's weights-only unpickler: of the globals that a pickle can name, tensors' own are made, Lightning's
    become inert objects, any other is refused. Nothing from the file is ever imported or run. Raises InputError, one
    line, for a file that is cut off, no checkpoint, holds other globals, no state_dict or anything but tensors in it.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    # one archive as torch.save writes it: stored, so that its tensors can be mapped and nothing can grow
    archive = _is_stored_archive(path)
    try:
        stubs = _lightning_stubs(path) if archive else []
        with warnings.catch_warnings(), torch.serialization.safe_globals(stubs):
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except InputError:
        raise
    # a hostile or broken pickle can make the unpickler raise anything: always blame the file
    except Exception as error:
        raise InputError(f"{path}: cannot be read as a checkpoint: {_cause(error)}; nothing in it was run") from None
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state:
        raise InputError(f"{path}: holds no state_dict; it must be a checkpoint as latent diffusion saves it")
    for key, value in state.items():
        if not isinstance(key, str) or not _is_plain_tensor(value):
            shown = f"{type(value).__name__}" if not isinstance(value, Tensor) else f"{value.dtype} {value.layout}"
            raise InputError(f"{path}: state_dict: {key!r} is a {shown}, not a plain tensor")
    return dict(state)


def _is_stored_archive(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [member.filename for member in archive.infolist() if member.compress_type != zipfile.ZIP_STORED]
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise InputError(f"{path}: cannot be read as a checkpoint: {_cause(error)}; nothing in it was run") from None
    if packed:
        raise InputError(f"{path}: is a compressed archive ({packed[0]}), not a checkpoint; unpack it first")
    return True


def _lightning_stubs(path: Path) -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    foreign = [name for name in names if not LIGHTNING.fullmatch(name)]
    if foreign:
        raise InputError(
            f"{path}: pickles {', '.join(foreign[:5])}, which is neither a tensor nor a class of Lightning's; refused, "
            "nothing in it was run"
        )
    return [(Inert, name) for name in names]


def _is_plain_tensor(value: Any) -> bool:
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_complex()
    )


def _cause(error: Exception) -> str:
    text = " ".join(str(error).split())
    if found := re.search(r"GLOBAL (\S+)", text):
        return f"it pickles {found.group(1)}, which is not allowed"
    return f"{type(error).__name__}: {text[:150]}" if text else type(error).__name__
