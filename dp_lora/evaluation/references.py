"""References for a score: classifiers of real pictures, of samples before fine-tuning, of public pictures."""

import hashlib

import matplotlib

from dp_lora.config.schema import Config
from dp_lora.data import letters
from dp_lora.data.layout import Dataset
from dp_lora.errors import InputError
from dp_lora.evaluation.base_samples import Labelled
from dp_lora.evaluation.cache import Cache
from dp_lora.evaluation.classifier import Classifier
from dp_lora.evaluation.pictures import resized, utility_pictures
from dp_lora.evaluation.utility import Score, Task


def train_on_real(task: Task, real: Dataset, cache: Cache) -> tuple[Classifier, Score]:
    """The classifier of the real training pictures, the ceiling, and its score."""
    facts = {"real": real.digest(), "classes": task.classes, "training": task.training.facts()}

    def make() -> Classifier:
        return task.train(utility_pictures(real), real.labels, "classifier of real pictures")

    network = cache.classifier("real", facts, make)
    return network, task.score(network)


def before_finetuning(task: Task, drawn: Labelled, cache: Cache) -> Score:
    """Score of a classifier of `drawn`: samples of the base as fine-tuning starts from it, labelled by class."""
    images, labels = resized(drawn[0], task.size, drawn[0].shape[3]), drawn[1]

    def make() -> Score:
        return task.score(task.train(images, labels, "classifier of the base's samples"))

    facts = {**task.facts(), "drawn": hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()}
    return Score.from_json(cache.json("before-finetuning", facts, lambda: make().to_json()))


def require_public_reference(config: Config) -> None:
    """InputError where evaluation.public_reference has no pictures of the private classes."""
    other = [name for name in config.data.classes if name not in list(letters.DIGITS)]
    if config.evaluation.public_reference == "digits" and other:
        raise InputError(f"evaluation.public_reference=digits: has no pictures of class {other[0]!r}; set it to null")


def public_only(task: Task, config: Config, cache: Cache) -> Score | None:
    """Score of a classifier of rendered digits, public pictures of the same classes; None where there are none.

    As many pictures as the public model was trained on: public pictures cost nothing.
    """
    if config.evaluation.public_reference is None:
        return None
    arguments = (config.public.n, config.experiment.seed, task.size, task.images.shape[3], task.classes)
    # rendering is a function of its arguments, its code (in the cache's key) and matplotlib's fonts
    facts = {**task.facts(), "digits": arguments, "matplotlib": matplotlib.__version__}

    def make() -> Score:
        return task.score(task.train(*letters.render_digits(*arguments), "classifier of public pictures"))

    return Score.from_json(cache.json("public-only", facts, lambda: make().to_json()))
