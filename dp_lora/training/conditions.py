"""What the rows of a micro-batch are conditioned on: a class's trained embedding, or a caption's frozen one."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dp_lora.data.conditions import Captions
from dp_lora.models.adapters import EMBEDDING
from dp_lora.models.families import Conditions
from dp_lora.models.folder import Model
from dp_lora.privacy.gradients import Rows


class ClassRows:
    """Rows of the class embedding, each from the copy of its own unit."""

    def __init__(self, labels: np.ndarray, device: torch.device) -> None:
        self._labels, self._device = labels, device

    def choose(self, picture: int, _stream: np.random.Generator) -> int:
        """What a row of a picture is conditioned on: its class."""
        return int(self._labels[picture])

    def of(self, chosen: Sequence[int], copies: Mapping[str, Tensor], rows: Rows) -> Conditions:
        """Conditions of the rows of `chosen` classes; the padded rows after them take class 0."""
        classes = np.zeros(len(rows.picture), np.int64)
        classes[: len(chosen)] = chosen
        label = torch.from_numpy(classes).to(self._device)
        return {"context": copies[EMBEDDING][rows.slot, label].unsqueeze(1)}


class CaptionRows:
    """Encoded captions, each its own picture's."""

    def __init__(self, model: Model, size: int, captions: Captions, device: torch.device) -> None:
        blank = model.family.blank(model.denoiser.config, size)
        self._blank = {name: tensor.numpy()[0] for name, tensor in blank.items()}
        self._captions, self._device = captions, device

    def choose(self, picture: int, stream: np.random.Generator) -> int:
        """The number of a picture's caption; of several, its stream draws one."""
        several = self._captions.of[picture]
        return several[0] if len(several) == 1 else several[int(stream.integers(len(several)))]

    def of(self, chosen: Sequence[int], _copies: Mapping[str, Tensor], rows: Rows) -> Conditions:
        """Conditions of the rows of `chosen` captions; the padded rows after them read no caption."""
        padding = len(rows.picture) - len(chosen)
        found = {}
        for name, blank in self._blank.items():
            stored = self._captions.tensors[name]
            array = np.stack([*(stored[number] for number in chosen), *[blank] * padding])
            found[name] = torch.from_numpy(array).to(self._device)
        return found
