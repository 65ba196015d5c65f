"""Precision and recall of samples (Kynkaanniemi et al. 2019, arXiv 1904.06991): do they look real, is all there?"""

import numpy as np
import torch
from numpy.typing import NDArray

from dp_lora.evaluation.features import FeatureSets, evenly_spaced
from dp_lora.evaluation.measurement import Measurement
from dp_lora.evaluation.nearest import radii, within

NEIGHBOURS = 3  # k, as in the paper


def precision_and_recall(
    samples: NDArray[np.float32], real: NDArray[np.float32], k: int, device: torch.device
) -> tuple[float, float]:
    """Precision and recall of features (n, d) and (m, d), both above k rows.

    The neighbourhood of a picture reaches to its k-th nearest other one of its own set. Precision is the share of
    samples that lie in the neighbourhood of a real picture, recall the share of real pictures in one of a sample.
    """
    precision = within(samples, real, radii(real, k, device), device).mean()
    recall = within(real, samples, radii(samples, k, device), device).mean()
    return float(precision), float(recall)


def precision_recall_scores(features: FeatureSets) -> list[Measurement]:
    """`precision` and `recall` against as many test pictures: neighbourhoods shrink with the number of pictures."""
    n = min(len(features.samples), len(features.test))
    samples, test = (rows[evenly_spaced(n, len(rows))] for rows in (features.samples, features.test))
    precision, recall = precision_and_recall(samples, test, NEIGHBOURS, features.sets.base.device)
    how = f"k={NEIGHBOURS}, {n} samples, {n} real test pictures, features: {features.space.shown}"
    return [
        Measurement("precision", precision, f"samples in a neighbourhood of a real test picture; {how}", private=True),
        Measurement("recall", recall, f"real test pictures in a neighbourhood of a sample; {how}", private=True),
    ]
