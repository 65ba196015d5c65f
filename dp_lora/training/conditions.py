"""Conditions of the rows of a micro-batch: a class's trained embedding, or a caption's frozen one."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dp_lora.data.conditions import AnyCaptions
from dp_lora.models.adapters import EMBEDDING
from dp_lora.models.families import Conditions
from dp_lora.models.folder import Model
from dp_lora.privacy.gradients import Rows


class ClassRows:
    """Rows of the class embedding, each from the copy of its own unit."""

    def __init__(self, labels: np.ndarray, device: torch.device) -> None:
        self._labels, self._device = labels, device

    def choose(self, picture: int, _stream: np.random.Generator) -> int:
        """The condition of a picture's row: its class."""
        return int(self._labels[picture])

    def of(self, chosen: Sequence[int], copies: Mapping[str, Tensor], rows: Rows) -> Conditions:
        """Conditions of the rows of `chosen` classes; the padded rows after them take class 0."""
        classes = np.zeros(len(rows.picture), np.int64)
        classes[: len(chosen)] = chosen
        label = torch.from_numpy(classes).to(self._device)
        return {"context": copies[EMBEDDING][rows.slot, label].unsqueeze(1)}


class CaptionRows:
    """Encoded captions, each its own picture's; a share `dropout` of the rows takes the empty caption instead.

    A coin from its own picture's stream decides for each row, and the empty caption is a public constant. So a row
    still reads its own picture's data alone, a unit's gradient reads no other unit, and the proof of step.py holds.
    """

    def __init__(self, model: Model, size: int, captions: AnyCaptions, dropout: float, device: torch.device) -> None:
        self._blank = model.family.blank(model.denoiser.config, size)
        self._captions, self._dropout, self._device = captions, dropout, device

    def choose(self, picture: int, stream: np.random.Generator) -> int:
        """The number of a row's caption: its picture's stream chooses the empty one, or one of several."""
        if self._dropout and stream.random() < self._dropout:
            return self._captions.empty
        several = self._captions.of[picture]
        return several[0] if len(several) == 1 else several[int(stream.integers(len(several)))]

    def of(self, chosen: Sequence[int], _copies: Mapping[str, Tensor], rows: Rows) -> Conditions:
        """Conditions of the rows of `chosen` captions; the padded rows after them read no caption."""
        padding = len(rows.picture) - len(chosen)
        found = {}
        for name, own in self._captions.rows(chosen).items():
            blank = self._blank[name].expand(padding, *own.shape[1:])
            found[name] = torch.cat([own.to(self._device), blank.to(self._device, own.dtype)])
        return found
