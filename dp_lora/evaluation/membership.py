"""Whether the released adapter shows who was in the training: a membership inference by loss, as an outsider would try.

Publish nothing of this. The attack itself needs no secret, but its score does: AUC and true positive rate are
functions of who was in the training and who was not, without noise. The guarantee bounds them for an attacker who has
to guess; it does not cover the answer sheet.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu
from torch import Tensor

from dp_lora.config.schema import Config
from dp_lora.data.captions import texts_of
from dp_lora.data.conditions import AnyCaptions, encode_captions
from dp_lora.data.layout import Dataset
from dp_lora.data.pixels import to_pixels
from dp_lora.diffusion import loss_per_row, process_of
from dp_lora.errors import PRIVATE_PICTURE, InputError, private_names
from dp_lora.evaluation.features import CODED_VALUES, evenly_spaced
from dp_lora.evaluation.intervals import bootstrap_interval
from dp_lora.evaluation.measurement import Measurement
from dp_lora.models.autoencoder import encode
from dp_lora.models.device import full_precision, pick_precision
from dp_lora.models.families import Conditions
from dp_lora.models.folder import Model
from dp_lora.progress import progress

PICTURES = 1000  # most of each side: enough for the interval, at a bounded cost
DRAWS = 32  # draws of time and noise per picture: their mean tells pictures apart, one draw hardly does
SEED = 0
FALSE_POSITIVES = 0.01


def auc(members: NDArray[np.float64], others: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    """Probability that a member's loss (..., n) is below that of another picture (..., m), equal ones half."""
    pairs = members.shape[axis] * others.shape[axis]
    return mannwhitneyu(others, members, axis=axis, method="asymptotic").statistic / pairs


def true_positives(members: NDArray[np.float64], others: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    """Share of members (..., n) whose loss lies below a limit that at most 1% of the others (..., m) lie below."""
    allowed = int(FALSE_POSITIVES * others.shape[axis])
    limit = np.take(np.sort(others, axis=axis), [allowed], axis=axis)
    return (members < limit).mean(axis=axis)


@private_names(PRIVATE_PICTURE)
def membership_scores(
    model: Model, config: Config, real: Dataset, test: Dataset, cache_folder: Path, ending: str = ""
) -> list[Measurement]:
    """`membership_auc` and `membership_tpr_at_1pct_fpr` of equal numbers of training and held-out pictures.

    `model` is the base with an adapter; `ending` of the metrics' names says which, "" for the one that is judged. Each
    picture is conditioned on its own class or caption, as in
    training; captions are kept encoded in `cache_folder`. Raises InputError for losses that are not finite.
    """
    n = min(len(real), len(test), PICTURES)
    members, others = (_losses_of(model, config, dataset, n, cache_folder) for dataset in (real, test))
    how = f"loss over {DRAWS} times and noises, {n} training and {n} held-out pictures"
    how += ending and ", under the adapter of evaluation.membership_beside"
    meanings = {
        "membership_auc": (auc, f"a training picture has less {how}; 0.5: no better than a coin"),
        "membership_tpr_at_1pct_fpr": (
            true_positives,
            f"training pictures found at 1% false alarms by less {how}; about 0.01: no better than a coin",
        ),
    }
    return [
        Measurement(
            name + ending,
            float(statistic(members, others)),
            meaning,
            True,
            *bootstrap_interval((members, others), statistic),
        )
        for name, (statistic, meaning) in meanings.items()
    ]


def _losses_of(model: Model, config: Config, dataset: Dataset, n: int, cache_folder: Path) -> NDArray[np.float64]:
    rows, captions = evenly_spaced(n, len(dataset)), None
    if not model.family.of_classes:
        texts = texts_of(config, dataset)
        captions = encode_captions(config, [texts[row] for row in rows], model, cache_folder / "captions")
    return losses(model, config, dataset, rows, captions)


@torch.inference_mode()
def losses(
    model: Model, config: Config, dataset: Dataset, rows: NDArray[np.int64], captions: AnyCaptions | None
) -> NDArray[np.float64]:
    """Mean loss of the pictures of `rows` (n,) over DRAWS times and noises, which are the same for every picture: (n,).

    `captions` are those of these pictures, in their order; None: the model is class-conditional.
    """
    device = model.device
    process = process_of(model.scheduler, "model.base").to(device)
    low, high = config.train.timestep_min, config.train.timestep_max
    shape = model.latent_shape(dataset.size)
    bfloat16 = pick_precision(config.sampling.precision, device, "sampling.precision") == torch.bfloat16
    found = []
    batch_size = config.sampling.batch_size
    for start in progress(range(0, len(rows), batch_size), desc="membership", leave=False):
        own = rows[start : start + batch_size]
        with full_precision():
            latents, total = _latents(model, dataset, own), torch.zeros(len(own), dtype=torch.float64, device=device)
            conditions = _conditions(model, dataset, own, range(start, start + len(own)), captions)
            for draw in range(DRAWS):
                stream = np.random.default_rng([SEED, draw])
                t = torch.from_numpy(np.full(len(own), process.time(stream, low, high), process.times)).to(device)
                noise = torch.from_numpy(stream.standard_normal(shape, dtype=np.float32)).to(device)
                x_t, target = process.noised(latents, noise.expand_as(latents), t)
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
                    prediction = model.predict(x_t, t, conditions)
                total += loss_per_row(prediction, target).double()
        found.append((total / DRAWS).cpu().numpy())
    losses = np.concatenate(found)
    if not np.isfinite(losses).all():
        raise InputError("evaluation.membership=true: the adapter's losses are NaN or infinite; its weights are broken")
    return losses


def _latents(model: Model, dataset: Dataset, rows: NDArray[np.int64]) -> Tensor:
    step = max(1, CODED_VALUES // (dataset.size**2 * dataset.channels))
    parts = [
        encode(model.vae, to_pixels(dataset.images(rows[start : start + step])).to(model.device))
        for start in range(0, len(rows), step)
    ]
    return torch.cat(parts)


def _conditions(
    model: Model, dataset: Dataset, rows: NDArray[np.int64], places: Sequence[int], captions: AnyCaptions | None
) -> Conditions:
    """The conditions of the pictures of `rows`; the first of several captions."""
    if captions is None:
        names = (dataset.classes[label] for label in dataset.labels[rows])
        label = torch.tensor([model.classes.index(name) for name in names], device=model.device)
        return {"context": model.embedded()[label].unsqueeze(1)}
    encoded = captions.rows([captions.of[place][0] for place in places])
    return {name: tensor.to(model.device) for name, tensor in encoded.items()}
