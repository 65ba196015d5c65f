"""Captions as the denoiser takes them: each distinct one is encoded once, alone, and kept as memory-mapped files.

Captions are private. They and their number are in no message but the terminal's, and the libraries' own warnings, one
of which prints the end of a caption that is too long, are silent here.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers

from dp_lora.errors import InputError
from dp_lora.files import digest_value, exclusive, private_folder, whole_folder
from dp_lora.models.device import full_precision
from dp_lora.models.folder import Model, module_digest
from dp_lora.models.pipelines import text_encoders
from dp_lora.progress import PERCENT, progress
from dp_lora.sources import digest_code
from dp_lora.team import Team

CODE = "data/conditions.py"
LIBRARIES = ("torch", "diffusers", "transformers")


@dataclass(frozen=True)
class Captions:
    """What pictures are conditioned on: `tensors` (distinct captions, ...), and where in them each picture's are."""

    tensors: Mapping[str, np.ndarray]
    of: Sequence[Sequence[int]]  # per picture; of several one is drawn anew for each row


def encode_captions(
    texts: Sequence[Sequence[str]],
    model: Model,
    size: int,
    cache_folder: Path,
    team: Team = Team(),  # noqa: B008 (frozen)
) -> Captions:
    """The captions of each picture, encoded by the pipeline's own text encoders, float32.

    Each caption is encoded alone: its embedding depends on no other caption, so that a unit's caption enters that
    unit's gradient alone. Kept in `cache_folder` (0700, files 0600) under a digest of captions, encoders, size, code.
    The first rank of `team` encodes, the others wait. Raises InputError for embeddings that are not finite.
    """
    distinct = list(dict.fromkeys(text for several in texts for text in several))
    encoders = [module_digest(encoder) for encoder in text_encoders(model.pipeline)]
    made_by = [model.device.type, digest_code(CODE), *map(version, LIBRARIES)]
    key = digest_value([distinct, encoders, model.family.pipeline, size, made_by])
    folder = private_folder(Path(cache_folder)) / f"{key[:32]}.captions"
    with exclusive(folder.with_suffix(".lock"), wait=True) if team.first else nullcontext():
        if not team.once(folder.exists()) and team.first:
            with full_precision(), _silent():
                _encode_to(folder, distinct, model, size)
        team.once()  # the others go on when the folder is there
    tensors = {path.stem: np.load(path, mmap_mode="r", allow_pickle=False) for path in sorted(folder.glob("*.npy"))}
    position = {text: number for number, text in enumerate(distinct)}
    return Captions(tensors, [[position[text] for text in several] for several in texts])


@torch.inference_mode()
def _encode_to(folder: Path, texts: Sequence[str], model: Model, size: int) -> None:
    with whole_folder(folder, private=True) as temporary:
        arrays: dict[str, np.memmap] = {}
        for number, text in enumerate(progress(texts, desc="captions", bar_format=PERCENT)):
            for name, tensor in model.family.encode(model.pipeline, text, size).items():
                row = (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()[0]
                if not np.isfinite(row).all():
                    raise InputError(
                        "captions: the base's text encoder gives NaN or infinite values; its weights are broken"
                    )
                if name not in arrays:
                    shape = (len(texts), *row.shape)
                    path = temporary / f"{name}.npy"
                    arrays[name] = np.lib.format.open_memmap(path, mode="w+", dtype=row.dtype, shape=shape)
                arrays[name][number] = row
        for array in arrays.values():
            array.flush()


@contextmanager
def _silent() -> Iterator[None]:
    """No line of the libraries below an error: `encode_prompt` warns with the cut-off end of a caption in full."""
    logs = (transformers.utils.logging, diffusers.utils.logging)
    before = [log.get_verbosity() for log in logs]
    try:
        for log in logs:
            log.set_verbosity_error()
        yield
    finally:
        for log, verbosity in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
