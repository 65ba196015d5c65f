"""A class-conditional model as a classifier: its class of least loss (Li et al. 2023, arXiv 2303.16203, section 3)."""

from collections.abc import Callable

import torch
from torch import Tensor

from dp_lora.diffusion import loss_per_row, process_of
from dp_lora.models.folder import Model
from dp_lora.models.pipeline_index import JUDGED_AT


def best_class(
    model: Model, latents: Tensor, noise: Callable[[], Tensor], predict: Callable[[Tensor, int, Tensor], Tensor]
) -> Tensor:
    """For latents (rows, C, H, W) the class of `model` with the least loss: its place in model.classes, (rows,) int64.

    `noise()` gives fresh N(0, 1) of the latents' shape, once for each of JUDGED_AT; all classes meet the same noise.
    `predict(x_t, t, context)` is the network's prediction at the timestep `t`, for contexts (rows, 1, D). It reads the
    model and its own samples alone, so of a fine-tuned model it is post-processing.
    """
    process = process_of(model.scheduler, "sampling.attempts").to(latents.device)
    embedded, rows = model.embedded()[: len(model.classes)], len(latents)  # without the null row
    losses = torch.zeros(rows, len(embedded), device=latents.device)
    for share in JUDGED_AT:
        t = int(share * model.scheduler.config["num_train_timesteps"])
        x_t, wanted = process.noised(latents, noise(), torch.full((rows,), t, device=latents.device))
        for label, row in enumerate(embedded):
            context = row.expand(rows, 1, -1)
            losses[:, label] += loss_per_row(predict(x_t, t, context), wanted)
    return losses.argmin(dim=1)
