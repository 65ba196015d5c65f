"""A Frechet distance on the features of a classifier of the public pictures, where Inception's weights are missing.

It is no FID and never called so: its numbers compare only with each other, for one set of letters. Like every Frechet
distance it grows as images get fewer, so compare equal numbers of images.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dp_lora.data.layout import read_dataset
from dp_lora.evaluation.cache import Cache
from dp_lora.evaluation.classifier import Classifier, ClassifierTraining, predict, train_classifier
from dp_lora.evaluation.pictures import resized, utility_pictures, utility_size


class LetterFeatures:
    """The classifier of the public letters, and the facts that determine it."""

    def __init__(self, network: Classifier, size: int, facts: dict[str, Any], device: torch.device) -> None:
        self.network, self.size, self.facts, self.device = network, size, facts, device
        self.channels = network.channels

    def features(self, batches: Iterable[NDArray[np.uint8]], _description: str = "") -> NDArray[np.float32]:
        """Features (n, 96) of images uint8 (n, H, W, C), which are brought to the letters' size and colours."""
        parts = (resized(part, self.size, self.channels) for part in batches)
        return np.concatenate([predict(self.network, part, self.device)[1] for part in parts])


def letter_features(
    public_folder: Path, classes: list[str], training: ClassifierTraining, cache: Cache, device: torch.device
) -> LetterFeatures:
    """Train the letters' classifier on the public dataset's training split, or take it from the cache."""
    letters = read_dataset(public_folder, classes, "train")
    facts = {"letters": letters.digest(), "classes": classes, "training": training.facts()}

    def make() -> Classifier:
        return train_classifier(
            utility_pictures(letters), letters.labels, len(classes), training, device, "letters' classifier"
        )

    network = cache.classifier("letters", facts, make)
    return LetterFeatures(network, utility_size(letters), facts, device)
