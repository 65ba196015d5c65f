"""The diffusion loss of private rows, in the form that the private step needs."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dp_lora.config.schema import Config
from dp_lora.data.conditions import AnyCaptions
from dp_lora.diffusion import loss_per_row, process_of
from dp_lora.models.adapters import unit_copies
from dp_lora.models.device import pick_precision
from dp_lora.models.folder import Model
from dp_lora.privacy.gradients import NOBODY, LossFunction, Rows
from dp_lora.privacy.randomness import ItemStreams
from dp_lora.privacy.sums import LossFactory
from dp_lora.training.conditions import CaptionRows, ClassRows


def diffusion_loss(
    config: Config,
    model: Model,
    latents: np.ndarray,
    labels: np.ndarray,
    device: torch.device,
    captions: AnyCaptions | None = None,
) -> LossFactory:
    """Loss of rows (R,): a time of the base's process from timestep_min to timestep_max, fresh noise, squared error.

    `latents` (N, c, h, w) float32, `labels` (N,) and, for a pipeline, `captions` are the private pictures. Each picture
    draws from its own stream: its draws depend neither on the other pictures of a step nor on how rows are cut into
    micro-batches. The denoiser runs in compute.precision: held in bfloat16, or held in float32 under autocast.
    Copies, their gradients and losses are float32.
    """
    # a base that is held in bfloat16 has nothing left to cast
    autocasts = model.precision == torch.float32 != pick_precision(config.compute.precision, device)
    process = process_of(model.scheduler, "model.base").to(device)
    conditions = (
        ClassRows(labels, device)
        if captions is None
        else CaptionRows(model, config.data.size, captions, config.train.caption_dropout, device)
    )
    shape = latents.shape[1:]

    def factory(draws: ItemStreams) -> LossFunction:
        def loss(copies: Mapping[str, Tensor], rows: Rows) -> Tensor:
            own = [picture for picture in rows.picture.tolist() if picture != NOBODY]
            low, high = config.train.timestep_min, config.train.timestep_max
            # a padded row keeps these values: it reads no picture, and advances no picture's stream
            pictures, noises = np.zeros((2, len(rows.picture), *shape), np.float32)
            times, chosen = np.full(len(pictures), low, process.times), []
            pictures[: len(own)] = latents[own]
            # row by row: a picture's draws must come in one order, however its rows are cut into micro-batches
            for row, picture in enumerate(own):
                times[row] = process.time(draws[picture], low, high)
                noises[row] = draws[picture].standard_normal(shape, dtype=np.float32)
                chosen.append(conditions.choose(picture, draws[picture]))
            x0, noise, t = (torch.from_numpy(array).to(device) for array in (pictures, noises, times))
            x_t, target = process.noised(x0, noise, t)
            condition = conditions.of(chosen, copies, rows)
            # the denoiser alone: autocast must not reach the losses; the clipped gradients are of float32 copies
            autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocasts)
            with unit_copies(model.denoiser, copies, len(x0)), autocast:
                prediction = model.predict(x_t, t, condition)
            return loss_per_row(prediction, target)

        return loss

    return factory
