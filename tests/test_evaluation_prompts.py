"""Classifier scores of a text-to-image base: samples of a class's public prompt count as that class."""

from pathlib import Path

import numpy as np
import pytest

from dp_lora.config import load
from dp_lora.data.layout import Picture, write_dataset
from dp_lora.data.letters import letter_pictures
from dp_lora.data.png import encode_png
from dp_lora.evaluation.evaluate import evaluate
from dp_lora.evaluation.utility import labelled_by
from dp_lora.events import Events
from dp_lora.models.adapters import ready_to_draw
from dp_lora.models.folder import load_model
from dp_lora.sampling import SPLIT
from tests.support.tiny_pipelines import SIZE, make_pipeline

COLOURS = {"red": 0, "green": 1, "blue": 2}
PROMPTS = {"a red thing": "red", "a blue thing": "blue"}
SETTINGS = (
    f"data.path=none data.n_public=4000 data.size={SIZE} data.channels=3 data.classes=[red,blue] "
    f"public.classes=[A,B] public.n=12 public.size={SIZE} public.channels=3 evaluation.classifier_steps=8 "
    "evaluation.min_images=20 evaluation.public_reference=null sampling.prompts='a hat|a blue thing|a red thing' "
    "sampling.steps=1 sampling.guidance_scale=1 sampling.eta=0 sampling.batch_size=30"
)
SCORES = {"accuracy", "accuracy_train_on_real", "accuracy_base", "class_agreement"}


def coloured(names: dict[str, str], n: int, split: str) -> list[Picture]:
    """`n` noisy pictures of each name's colour."""
    rng = np.random.default_rng(len(split))
    found = []
    for name, colour in names.items():
        for number in range(n):
            image = rng.integers(0, 120, (SIZE, SIZE, 3), dtype=np.uint8)
            image[..., COLOURS[colour]] += 100
            found.append(Picture(f"{split}-{name}-{number}.png", name, split, encode_png(image)))
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Private red and blue pictures, and samples of the public prompts for them, and of a third prompt before these."""
    root = tmp_path_factory.mktemp("prompts")
    make_pipeline(root / "base", "sd")
    real = {"red": "red", "blue": "blue"}
    private = [*coloured(real, 12, "train"), *coloured(real, 10, "test")]
    write_dataset(root / "private", private, {}, SIZE, 3, packed=True)
    write_dataset(root / "samples", coloured({"a hat": "green", **PROMPTS}, 10, SPLIT), {}, SIZE, 3, packed=True)
    write_dataset(root / "letters", letter_pictures(12, ["A", "B"], 0, SIZE, 3), {}, SIZE, 3, packed=True)
    return root


def scored(root: Path, prompts: str):
    config = load("folder", {}, f"{SETTINGS} data.prompts=[{prompts}]")
    base = ready_to_draw(load_model(root / "base"), config)
    drawn = base.info["classes"]
    caches = (root / "public-cache", root / "cache")
    return evaluate(
        config, root / "samples", drawn, True, root / "private", root / "letters", base, None, {}, *caches,
        root / "out", Events()
    )  # fmt: skip


def test_samples_of_each_class_s_prompt_teach_a_classifier_that_class(world):
    right = scored(world, "'a red thing','a blue thing'")
    assert right.metrics.keys() >= SCORES
    assert right.metrics["accuracy"] > 0.9
    assert right.per_class["class"] == ["red", "blue"]
    assert right.per_class["class_agreement"] == [1, 1]
    assert right.private >= SCORES
    # the same samples under exchanged prompts are wrong: the prompt alone decides
    wrong = scored(world, "'a blue thing','a red thing'").metrics
    assert wrong["accuracy"] < 0.1
    assert wrong["accuracy_train_on_real"] == right.metrics["accuracy_train_on_real"]


@pytest.mark.parametrize("prompts", ["'a red thing','a dog'", "'a hat','a hat'"])
def test_classes_without_samples_of_a_prompt_of_their_own_have_no_accuracy_and_the_terminal_says_so(
    prompts, world, capsys
):
    assert not scored(world, prompts).metrics.keys() & SCORES
    assert "accuracy is left out: it needs samples of each of data.prompts" in capsys.readouterr().err


def test_a_picture_s_label_becomes_the_place_of_its_class_and_other_pictures_are_left_out():
    images = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1)
    kept, labels = labelled_by((images, np.array([2, 0, 1, 2])), ["x", "other", "y"], ["y", "x"])
    assert kept.ravel().tolist() == [0, 1, 3]
    assert labels.tolist() == [0, 1, 0]
