"""Captions as the denoiser takes them: each encoded alone, once and kept as memory-mapped files, or anew in each step.

Captions are private: no message but the terminal's contains them or their number. The libraries' own warnings are
silenced here, since one of them prints the end of a caption that is too long.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dp_lora.config.schema import Config
from dp_lora.data.mapped import mapped_again, mapped_rows, record_rows, recorded_rows
from dp_lora.errors import InputError
from dp_lora.files import digest_value, exclusive, private_folder, publish
from dp_lora.models.device import full_precision
from dp_lora.models.families import TEXT, Conditions
from dp_lora.models.folder import Model, module_digest
from dp_lora.models.pipelines import text_encoders
from dp_lora.models.quiet import quiet_libraries
from dp_lora.progress import PERCENT, progress
from dp_lora.sources import digest_code
from dp_lora.team import Team

CODE = "data/conditions.py"
LIBRARIES = ("torch", "diffusers", "transformers")
STILL_EVERY = 100  # captions between two signals of the first rank that it still encodes
RECORD_EVERY = 1000  # captions between two records of progress
BITS = np.uint16  # numpy has no bfloat16: a file holds its bits


@dataclass(frozen=True)
class Captions:
    """The pictures' conditions: `tensors` (distinct captions, ...), and each picture's positions in them."""

    tensors: Mapping[str, Tensor]
    of: Sequence[Sequence[int]]  # positions per picture; each row draws one of several anew
    empty: int = 0  # position of the empty caption, which train.caption_dropout swaps in

    def rows(self, numbers: Sequence[int]) -> Conditions:
        """Conditions (rows, ...) of the captions of these numbers, on the CPU."""
        return {name: tensor[list(numbers)] for name, tensor in self.tensors.items()}


@dataclass(frozen=True)
class CaptionsOfEachStep:
    """As `Captions`, but keeps none: each row's caption is encoded alone, when its micro-batch is made."""

    texts: Sequence[str]
    of: Sequence[Sequence[int]]
    empty: int
    model: Model
    size: int

    def rows(self, numbers: Sequence[int]) -> Conditions:
        """As `Captions.rows`, on the model's device. Does not refuse NaN or infinity: the clip counts it as 0."""
        with full_precision(), quiet_libraries():
            encoded = {number: _encoded(self.texts[number], self.model, self.size) for number in dict.fromkeys(numbers)}
        return {name: torch.cat([encoded[number][name] for number in numbers]) for name in encoded[numbers[0]]}


AnyCaptions = Captions | CaptionsOfEachStep


def encode_captions(
    config: Config,
    texts: Sequence[Sequence[str]],
    model: Model,
    cache_folder: Path,
    team: Team = Team(),  # noqa: B008 (frozen)
) -> AnyCaptions:
    """The captions of each picture, encoded by the pipeline's own text encoders, in its denoiser's precision.

    Each caption is encoded alone: its embedding depends on no other caption, so that a unit's caption enters that
    unit's gradient alone. With compute.captions=cached they are kept in `cache_folder` (0700, files 0600) under a
    digest of captions, encoders, size, code; the first rank of `team` encodes, the others wait. An interrupted encoding
    goes on from its last record. Raises InputError for embeddings that are not finite.
    """
    size = config.data.size
    distinct = list(dict.fromkeys([*(text for several in texts for text in several), ""]))
    position = {text: number for number, text in enumerate(distinct)}
    of = [[position[text] for text in several] for several in texts]
    if config.compute.captions == "each_step":
        with full_precision(), quiet_libraries():
            _require_finite(_encoded("", model, size))
        return CaptionsOfEachStep(distinct, of, position[""], model, size)
    encoders = [module_digest(encoder) for encoder in text_encoders(model.pipeline)]
    made_by = [str(model.precision), model.device.type, digest_code(CODE), *map(version, LIBRARIES)]
    key = digest_value([distinct, encoders, model.family.pipeline, size, made_by])
    folder = private_folder(Path(cache_folder)) / f"{key[:32]}.captions"
    with exclusive(folder.with_suffix(".lock"), wait=True) if team.first else nullcontext():
        if not team.once(folder.exists()) and team.first:
            with full_precision(), quiet_libraries():
                _encode_to(folder, distinct, model, size, team)
        while not team.once(True):  # the other ranks wait for the folder
            pass
    tensors = {path.stem: _mapped(path) for path in sorted(folder.glob("*.npy"))}
    return Captions(tensors, of, position[""])


@torch.no_grad()
def _encoded(text: str, model: Model, size: int) -> Conditions:
    """One caption's conditions, (1, ...) each."""
    encoded = model.family.encode(model.pipeline, text, size)
    return {name: tensor.to(model.precision) if name in TEXT else tensor for name, tensor in encoded.items()}


def _require_finite(encoded: Conditions) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in encoded.values()):
        raise InputError("captions: the base's text encoder gives NaN or infinite values; its weights are broken")


def _encode_to(folder: Path, texts: Sequence[str], model: Model, size: int, team: Team) -> None:
    part = private_folder(folder.with_suffix(".part"))
    record = part / "rows.json"
    done = recorded_rows(record)
    arrays = {path.stem: mapped_again(path) for path in part.glob("*.npy")} if done else {}
    with progress(total=len(texts), initial=done, desc="captions", bar_format=PERCENT) as bar:
        for number in range(done, len(texts)):
            if number % STILL_EVERY == 0:
                team.once(False)  # otherwise the others take this rank for hung
            if number > done and number % RECORD_EVERY == 0:
                record_rows(record, number, arrays.values())
            encoded = _encoded(texts[number], model, size)
            _require_finite(encoded)
            for name, tensor in encoded.items():
                row = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor)[0].cpu().numpy()
                if name not in arrays:
                    arrays[name] = mapped_rows(part / f"{name}.npy", row.dtype, (len(texts), *row.shape))
                arrays[name][number] = row
            bar.update()
    record_rows(record, len(texts), arrays.values())
    publish(part, folder, private=True)


def _mapped(path: Path) -> Tensor:
    # "c", copy on write: torch takes only arrays that it may write to; its writes never reach the file
    array = np.load(path, mmap_mode="c", allow_pickle=False)
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == BITS else tensor
