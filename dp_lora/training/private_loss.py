"""The diffusion loss of private rows, as the private step asks for it."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dp_lora.config.schema import Config
from dp_lora.diffusion import add_noise, loss_per_row, target
from dp_lora.models.adapters import EMBEDDING, unit_copies
from dp_lora.models.device import pick_precision
from dp_lora.models.folder import Model
from dp_lora.privacy.gradients import LossFunction, Rows
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
    all_labels = torch.as_tensor(labels, device=device)

    def factory(draws: ItemStreams) -> LossFunction:
        def loss(copies: Mapping[str, Tensor], rows: Rows) -> Tensor:
            pictures = rows.picture.tolist()
            x0 = torch.from_numpy(latents[pictures]).to(device)
            low, high = config.train.timestep_min, config.train.timestep_max
            # row by row: a picture's draws must come in one order, however its rows are cut into micro-batches
            drawn = [
                (draws[picture].integers(low, high), draws[picture].standard_normal(shape, dtype=np.float32))
                for picture in pictures
            ]
            t = torch.tensor([int(timestep) for timestep, _ in drawn], device=device)
            noise = torch.from_numpy(np.stack([noise for _, noise in drawn])).to(device)
            context = copies[EMBEDDING][rows.slot, all_labels[rows.picture]].unsqueeze(1)
            x_t = add_noise(x0, noise, alphas_cumprod, t)
            # the UNet alone: its autocast must not reach losses, and what is clipped comes out of float32 copies
            autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16)
            with unit_copies(model.unet, copies, rows.rows_per_unit or rows.slot), autocast:
                prediction = model.unet(x_t, t, context).sample
            return loss_per_row(prediction.float(), target(x0, noise, alphas_cumprod, t, prediction_type))

        return loss

    return factory
