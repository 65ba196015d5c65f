"""The diffusion loss of private rows, as the private step asks for it."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dp_lora.config.schema import Config
from dp_lora.diffusion import add_noise, loss_per_row, target
from dp_lora.models.adapters import EMBEDDING, unit_copies
from dp_lora.models.folder import Model
from dp_lora.privacy.gradients import LossFunction, Rows
from dp_lora.privacy.step import LossFactory


def diffusion_loss(
    config: Config, model: Model, latents: np.ndarray, labels: np.ndarray, device: torch.device
) -> LossFactory:
    """Loss of rows (R,): timestep uniform in [timestep_min, timestep_max), fresh noise, squared error per row.

    `latents` (N, c, h, w) float32 and `labels` (N,) are the private pictures. The draws are made row by row in their
    order, so that the result does not depend on how rows are cut into micro-batches.
    """
    alphas_cumprod = model.scheduler.alphas_cumprod.to(device)
    prediction_type = model.scheduler.config["prediction_type"]
    shape = latents.shape[1:]
    all_labels = torch.as_tensor(labels, device=device)

    def factory(generator: torch.Generator) -> LossFunction:
        def loss(copies: Mapping[str, Tensor], rows: Rows) -> Tensor:
            x0 = torch.from_numpy(latents[rows.picture.cpu().numpy()]).to(device)
            t = torch.empty(len(rows.slot), dtype=torch.int64, device=device)
            noise = torch.empty(x0.shape, device=device)
            for row in range(len(t)):
                t[row] = torch.randint(
                    config.train.timestep_min,
                    config.train.timestep_max,
                    (),
                    generator=generator,
                    device=device,
                )
                noise[row] = torch.randn(shape, generator=generator, device=device)
            context = copies[EMBEDDING][rows.slot, all_labels[rows.picture]].unsqueeze(1)
            with unit_copies(model.unet, copies, rows.slot):
                prediction = model.unet(add_noise(x0, noise, alphas_cumprod, t), t, context).sample
            return loss_per_row(prediction, target(x0, noise, alphas_cumprod, t, prediction_type))

        return loss

    return factory
