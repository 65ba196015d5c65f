"""Lightning, set up for public training that may be killed at any moment and continues from its last checkpoint."""

import logging
import pickle
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch

from dp_lora.errors import InputError
from dp_lora.events import Events
from dp_lora.files import whole_file
from dp_lora.training.progress import Report
from dp_lora.training.steps import Steps

CHECKPOINT = "last.ckpt"
CHECKPOINT_SECONDS = 60.0


class PublicTraining(L.LightningModule):
    """A training of `steps.total` steps. `training_step(step)` returns its losses by name, "loss" among them."""

    def __init__(self, total: int) -> None:
        super().__init__()
        self.steps = Steps(total)

    def train_dataloader(self) -> Steps:
        return self.steps

    def set_lr(self, lr: float) -> None:
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr


class KeepCheckpoint(L.Callback):
    """Writes a checkpoint when the last one is older than `seconds`: whole or not at all, one file."""

    def __init__(self, path: Path, steps: Steps, seconds: float) -> None:
        self.path, self.steps, self.seconds = path, steps, seconds
        self._last = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: int, batch_idx: int
    ) -> None:
        if time.monotonic() - self._last >= self.seconds or batch + 1 == self.steps.total:
            with whole_file(self.path) as temporary:
                trainer.save_checkpoint(temporary)
            self._last = time.monotonic()


@contextmanager
def _quiet() -> Iterator[None]:
    # silences Lightning's remarks on accelerators, loaders and loggers: the user can act on none of them
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def fit(
    module: PublicTraining,
    folder: Path,
    device: torch.device,
    label: str,
    batch_size: int,
    events: Events,
    gradient_clip: float | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> None:
    """Train `module` to its last step on `device`; afterwards it lies on the CPU.

    `folder` belongs to this training alone (its settings and data): it holds the checkpoint from which a later call
    continues. Raises InputError for a checkpoint that cannot be read, and for a loss that is no longer finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f".{Path(CHECKPOINT).stem}.*.tmp*"):
        leftover.unlink()  # left by a kill while a checkpoint was written
    checkpoint = folder / CHECKPOINT
    with _quiet():
        trainer = L.Trainer(
            accelerator="gpu" if device.type == "cuda" else device.type,
            devices=1,
            max_epochs=1,
            gradient_clip_val=gradient_clip,
            callbacks=[
                Report(label, module.steps, batch_size, events),
                KeepCheckpoint(checkpoint, module.steps, checkpoint_seconds),
            ],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        try:
            # weights_only: a checkpoint is tensors and plain values, never code
            trainer.fit(module, ckpt_path=checkpoint if checkpoint.exists() else None, weights_only=True)
        except SystemExit as stop:
            # Lightning turns an interrupt into an exit; hand the interrupt back, for the caller to decide
            raise stop.__context__ if isinstance(stop.__context__, KeyboardInterrupt) else KeyboardInterrupt() from None
        except (pickle.UnpicklingError, EOFError, KeyError, RuntimeError) as error:
            if module.steps.next or not checkpoint.exists():
                raise
            raise InputError(
                f"{checkpoint}: cannot be read ({' '.join(str(error).split())[:120]}); delete it to train anew"
            ) from None
    module.cpu()
