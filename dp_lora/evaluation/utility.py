"""Utility: how well a classifier that saw one set of images alone does on the real test pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dp_lora.evaluation.base_samples import Labelled
from dp_lora.evaluation.classifier import Classifier, ClassifierTraining, predict, train_classifier
from dp_lora.evaluation.intervals import share_interval


@dataclass(frozen=True)
class Score:
    """`confusion` int64 (classes, classes): rows are the real class, columns the predicted one."""

    confusion: NDArray[np.int64]

    @property
    def n(self) -> int:
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        return int(np.trace(self.confusion))

    @property
    def accuracy(self) -> float:
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95%, over test pictures: it leaves out the variation of another training or another set of samples."""
        return share_interval(self.correct, self.n)

    def to_json(self) -> dict[str, Any]:
        return {"confusion": self.confusion.tolist()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Score":
        return cls(np.array(value["confusion"], dtype=np.int64))


def score(network: Classifier, images: NDArray[np.uint8], labels: NDArray[np.int64], device: torch.device) -> Score:
    """Confusion of `network` on images uint8 (n, H, W, C) with labels int64 (n,)."""
    classes = network.head.out_features
    predicted = predict(network, images, device)[0].argmax(axis=1)
    return Score(np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes))


def labelled_by(pictures: Labelled, names: Sequence[str], subjects: Sequence[str]) -> Labelled:
    """The pictures whose subject, names[label], is one of `subjects`, labelled by their place in `subjects`.

    `subjects` holds what is drawn for each class, in the order of the classes: its name, or its public prompt.
    """
    places = {subject: place for place, subject in enumerate(subjects)}
    labels = np.array([places.get(name, -1) for name in names], np.int64)[pictures[1]]
    return pictures[0][labels >= 0], labels[labels >= 0]


@dataclass(frozen=True)
class Task:
    """The real test pictures that every classifier of one evaluation is scored on."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    digest: str
    classes: list[str]
    training: ClassifierTraining
    device: torch.device

    @property
    def size(self) -> int:
        return self.images.shape[1]

    def facts(self) -> dict[str, Any]:
        """JSON-able: all that a score depends on, except the training images."""
        return {"test": self.digest, "classes": self.classes, "training": self.training.facts()}

    def train(self, images: NDArray[np.uint8], labels: NDArray[np.int64], description: str) -> Classifier:
        return train_classifier(images, labels, len(self.classes), self.training, self.device, description)

    def score(self, network: Classifier) -> Score:
        return score(network, self.images, self.labels, self.device)
