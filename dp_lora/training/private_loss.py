"""The diffusion loss of private rows, as the private step asks for it."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dp_lora.config.schema import Config
from dp_lora.diffusion import diffuse, loss_per_row, target
from dp_lora.models.adapters import EMBEDDING, unit_copies
from dp_lora.models.device import pick_precision
from dp_lora.models.folder import Model
from dp_lora.privacy.gradients import NOBODY, LossFunction, Rows
from dp_lora.privacy.randomness import ItemStreams
from dp_lora.privacy.sums import LossFactory


def diffusion_loss(
    config: Config, model: Model, latents: np.ndarray, labels: np.ndarray, device: torch.device
) -> LossFactory:
    """Loss of rows (R,): timestep uniform in [timestep_min, timestep_max), fresh noise, squared error per row.

    `latents` (N, c, h, w) float32 and `labels` (N,) are the private pictures. Each picture draws from its own stream:
    its draws depend neither on the other pictures of a step nor on how rows are cut into micro-batches. The UNet runs
    in compute.precision (bfloat16 by autocast); copies, their gradients and losses are float32.
    """
    bfloat16 = pick_precision(config.compute.precision, device) == torch.bfloat16
    alphas_cumprod = model.scheduler.alphas_cumprod.to(device)
    prediction_type = model.scheduler.config["prediction_type"]
    shape = latents.shape[1:]

    def factory(draws: ItemStreams) -> LossFunction:
        def loss(copies: Mapping[str, Tensor], rows: Rows) -> Tensor:
            own = [picture for picture in rows.picture.tolist() if picture != NOBODY]
            low, high = config.train.timestep_min, config.train.timestep_max
            # a padded row stays as it is here: it reads no picture, and moves no picture's stream on
            pictures, noises = np.zeros((2, len(rows.picture), *shape), np.float32)
            timesteps, classes = np.full(len(pictures), low), np.zeros(len(pictures), np.int64)
            pictures[: len(own)], classes[: len(own)] = latents[own], labels[own]
            # row by row: a picture's draws must come in one order, however its rows are cut into micro-batches
            for row, picture in enumerate(own):
                timesteps[row] = draws[picture].integers(low, high)
                noises[row] = draws[picture].standard_normal(shape, dtype=np.float32)
            x0, noise, t, label = (
                torch.from_numpy(array).to(device) for array in (pictures, noises, timesteps, classes)
            )
            context = copies[EMBEDDING][rows.slot, label].unsqueeze(1)
            x_t = diffuse(x0, noise, alphas_cumprod, t)
            # the UNet alone: its autocast must not reach losses, and what is clipped comes out of float32 copies
            autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16)
            with unit_copies(model.unet, copies), autocast:
                prediction = model.unet(x_t, t, context).sample
            return loss_per_row(prediction.float(), target(x0, noise, alphas_cumprod, t, prediction_type))

        return loss

    return factory
