"""Samples drawn from captions: how many look like the private set, and how many match their caption.

Two classifiers judge, of real pictures alone. The prompts are captions of the private test split and of the public set:
fine-tuning saw none of these private pictures. Base, real public and real private pictures stand beside the samples.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dp_lora.data.layout import Dataset
from dp_lora.evaluation.base_samples import Labelled
from dp_lora.evaluation.cache import Cache
from dp_lora.evaluation.classifier import Classifier, ClassifierTraining, predict, train_classifier
from dp_lora.evaluation.intervals import share_interval
from dp_lora.evaluation.measurement import Measurement
from dp_lora.evaluation.pictures import resized, utility_pictures, utility_size
from dp_lora.evaluation.utility import labelled_by

PUBLIC, PRIVATE = 0, 1  # classes of style


def caption_measurements(
    samples: Dataset,
    public: Dataset,
    real: Dataset,
    test: Dataset,
    of_base: Labelled,
    training: ClassifierTraining,
    cache: Cache,
    device: torch.device,
) -> list[Measurement]:
    """`private_style` and `right_caption` of samples, base, real public and real private pictures, with 95% intervals.

    `samples` are labelled by their prompts, and `of_base`, samples of the base without an adapter, by their places
    among these; `real` and `test` are the private training and test split. Prompts that are no caption of both `public`
    and `test` are left out. Reads private pictures without noise: for the operator alone. Empty where fewer than two
    prompts are left.
    """
    prompts = [name for name in samples.classes if _rows(public, [name])[0].size and _rows(test, [name])[0].size]
    if len(prompts) < 2:
        return []
    facts: dict[str, Any] = {"public": public.digest(), "real": real.digest(), "test": test.digest()}
    facts |= {"prompts": prompts, "training": training.facts()}
    known = {"public": _of(public, prompts), "real": _of(test, prompts)}

    def style() -> Classifier:
        kept = np.setdiff1d(np.arange(len(public)), _rows(public, prompts)[0])
        # one picture per person: a family of many skin tones counts once
        units = real.persons or list(map(str, range(len(real))))
        first = np.sort(np.unique(units, return_index=True)[1])
        images = np.concatenate([utility_pictures(public)[kept], utility_pictures(real)[first]])
        labels = np.repeat([PUBLIC, PRIVATE], [len(kept), len(first)])
        return train_classifier(images, labels, 2, training, device, "style classifier")

    def caption() -> Classifier:
        images, labels = (np.concatenate(both) for both in zip(*known.values(), strict=True))
        return train_classifier(images, labels, len(prompts), training, device, "caption classifier")

    judges = {
        "private_style": cache.classifier("style", facts, style),
        "right_caption": cache.classifier("caption", facts, caption),
    }
    images, labels = of_base
    judged = {
        "": labelled_by((utility_pictures(samples), samples.labels), samples.classes, prompts),
        "_base": labelled_by(
            (resized(images, utility_size(samples), samples.channels), labels), samples.classes, prompts
        ),
        "_public": known["public"],
        "_real": known["real"],
    }
    return [
        _measured(name, ending, judges[name], pictures, device)
        for name in judges
        for ending, pictures in judged.items()
        if len(pictures[1])
    ]


WHOSE: Mapping[str, str] = {
    "": "samples",
    "_base": "samples of the base without an adapter",
    "_public": "real public pictures",
    "_real": "real private test pictures",
}


def _measured(name: str, ending: str, judge: Classifier, pictures: Labelled, device: torch.device) -> Measurement:
    images, labels = pictures
    found = predict(judge, images, device)[0].argmax(axis=1)
    style = name == "private_style"
    right = int((found == (PRIVATE if style else labels)).sum())
    low, high = share_interval(right, len(images))
    said = (
        "in the private set's style, by a classifier of real pictures of other captions"
        if style
        else (f"of their own caption among {judge.head.out_features}, by a classifier of these real pictures")
    )
    return Measurement(name + ending, right / len(images), f"{WHOSE[ending]} {said}", True, low, high)


def _rows(dataset: Dataset, prompts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of the pictures whose caption is one of `prompts`, and its position there."""
    position = {name: place for place, name in enumerate(prompts)}
    found = [
        (row, position[text]) for row, texts in enumerate(dataset.captions or ()) for text in texts if text in position
    ]
    rows = np.array(found, np.int64).reshape(-1, 2)
    return rows[:, 0], rows[:, 1]


def _of(dataset: Dataset, prompts: Sequence[str]) -> Labelled:
    rows, labels = _rows(dataset, prompts)
    return utility_pictures(dataset)[rows], labels
