"""Progress of a public training: a bar with the time left, means of its losses, its speed."""

import math
import time
from collections.abc import Mapping
from typing import Any

import lightning as L
from torch import Tensor
from tqdm import tqdm

from dp_lora.errors import InputError
from dp_lora.events import Events
from dp_lora.progress import progress
from dp_lora.training.steps import Steps

LOG_EVERY = 50  # steps: a loss is read from the device only then


class Report(L.Callback):
    """Bar and metrics of a training whose `training_step` returns its losses by name: scalars, "loss" among them."""

    def __init__(self, label: str, steps: Steps, batch_size: int, events: Events) -> None:
        self.label, self.steps, self.batch_size, self.events = label, steps, batch_size, events
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self._steps = 0
        self._since = 0.0
        self._bar: tqdm | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        done = self.steps.next
        if done:
            self.events.message(f"{self.label}: goes on at step {done} of {self.steps.total}")
        self._bar = progress(total=self.steps.total, initial=done, desc=self.label, unit="step")
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: int, batch_idx: int
    ) -> None:
        for name, value in outputs.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value.detach(), count + 1)
        self._steps += 1
        if (batch + 1) % LOG_EVERY == 0 or batch + 1 == self.steps.total:
            self._tell(batch + 1)
        if self._bar is not None:
            self._bar.update()

    def _tell(self, step: int) -> None:
        means: Mapping[str, float] = {name: total.item() / count for name, (total, count) in self._sums.items()}
        if not math.isfinite(means["loss"]):
            raise InputError(f"{self.label}: the loss is no longer finite at step {step}; lower the stage's lr")
        seconds = time.perf_counter() - self._since
        for name, value in means.items():
            self.events.metric(name, value, step)
        self.events.metric("images_per_second", self._steps * self.batch_size / seconds, step)
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{means['loss']:.4f}", refresh=False)
        self._sums, self._steps, self._since = {}, 0, time.perf_counter()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._bar is not None:
            self._bar.close()
