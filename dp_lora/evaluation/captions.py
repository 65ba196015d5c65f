"""Samples drawn from captions: how many look like the private set, and how many match their caption.

Two classifiers judge, of real pictures alone. The prompts are captions of the private test split and of the public set:
fine-tuning saw none of these private pictures. Base, real public and real private pictures stand beside the samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dp_lora.config.schema import Config
from dp_lora.data.layout import Dataset
from dp_lora.evaluation.cache import Cache
from dp_lora.evaluation.classifier import Classifier, ClassifierTraining, predict, train_classifier
from dp_lora.evaluation.intervals import share_interval
from dp_lora.evaluation.measurement import Measurement
from dp_lora.evaluation.pictures import utility_pictures
from dp_lora.models.folder import Model
from dp_lora.sampling import balanced, draw_in_batches, model_fingerprint

Labelled = tuple[NDArray[np.uint8], NDArray[np.int64]]  # pictures (n, H, W, C), and their labels (n,)
PUBLIC, PRIVATE = 0, 1  # classes of style


def caption_measurements(
    config: Config,
    samples: Dataset,
    public: Dataset,
    real: Dataset,
    test: Dataset,
    base: Model,
    training: ClassifierTraining,
    cache: Cache,
) -> list[Measurement]:
    """`private_style` and `right_caption` of samples, base, real public and real private pictures, with 95% intervals.

    `samples` are labelled by their prompts; `real` and `test` are the private training and test split. Prompts that
    are no caption of both `public` and `test` are left out. Reads private pictures without noise: for the operator
    alone. Empty where fewer than two prompts are left.
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
        return train_classifier(images, labels, 2, training, base.device, "style classifier")

    def caption() -> Classifier:
        images, labels = (np.concatenate(both) for both in zip(*known.values(), strict=True))
        return train_classifier(images, labels, len(prompts), training, base.device, "caption classifier")

    judges = {
        "private_style": cache.classifier("style", facts, style),
        "right_caption": cache.classifier("caption", facts, caption),
    }
    position = [samples.classes.index(name) for name in prompts]
    drawn = np.isin(samples.labels, position)
    labels = np.searchsorted(position, samples.labels[drawn])
    n = int(drawn.sum()) // len(prompts)
    judged = {
        "": (utility_pictures(samples)[drawn], labels),
        "_base": _of_base(config, base, prompts, max(1, n), cache),
        "_public": known["public"],
        "_real": known["real"],
    }
    return [
        _measured(name, ending, judges[name], pictures, base) for name in judges for ending, pictures in judged.items()
    ]


WHOSE: Mapping[str, str] = {
    "": "samples",
    "_base": "samples of the base without an adapter",
    "_public": "real public pictures",
    "_real": "real private test pictures",
}


def _measured(name: str, ending: str, judge: Classifier, pictures: Labelled, base: Model) -> Measurement:
    images, labels = pictures
    found = predict(judge, images, base.device)[0].argmax(axis=1)
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


def _of_base(config: Config, base: Model, prompts: list[str], n: int, cache: Cache) -> Labelled:
    """n samples of each prompt from the base, drawn as those of the fine-tuned model are."""
    sampling, seed = config.sampling, config.experiment.seed
    info: dict[str, Any] = {**base.info, "size": config.data.size, "classes": prompts}
    model = replace(base, info=info)
    rows = balanced(prompts, n * len(prompts))
    labels = np.array([prompts.index(name) for name, _ in rows], np.int64)
    facts = {"model": model_fingerprint(model), "n": n, "seed": seed, "sampling": asdict(sampling)}

    def make() -> NDArray[np.uint8]:
        return draw_in_batches(model, labels.tolist(), [k for _, k in rows], sampling, seed, base.device)

    return cache.array("base-samples", facts, make), labels
