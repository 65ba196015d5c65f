"""A whole evaluation on tiny pictures: its measurements, its caches, its private marks and its refusals."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dp_lora.evaluation.classifier as classifier_module
import dp_lora.evaluation.utility as utility_module
from dp_lora import sources
from dp_lora.config import ROOT
from dp_lora.data.layout import Picture, read_dataset, write_dataset
from dp_lora.data.letters import letter_pictures, render_digits
from dp_lora.data.png import encode_png
from dp_lora.errors import InputError
from dp_lora.evaluation import cache
from dp_lora.evaluation.evaluate import evaluate
from dp_lora.evaluation.pictures import resized, utility_pictures
from dp_lora.evaluation.report import write_confusion
from dp_lora.events import Events
from dp_lora.models.autoencoder import decode, encode
from dp_lora.sampling import SPLIT
from tests.support.drawn_model import tiny_config, tiny_model
from tests.support.inception import write_stand_in

DIGITS = ["0", "1", "2"]
LETTERS = ["A", "B", "C"]
OPTIONS = (
    "data.classes=[0,1,2] public.classes=[A,B,C] public.n=90 evaluation.public_reference=digits "
    "evaluation.classifier_steps=25 evaluation.min_images=30 sampling.batch_size=30"
)


def digits(n: int, seed: int, split: str):
    images, labels = render_digits(n, seed, size=16, classes=DIGITS)
    return [
        Picture(f"{split}-{i}.png", DIGITS[label], split, encode_png(image))
        for i, (image, label) in enumerate(zip(images, labels, strict=True))
    ]


def write(folder: Path, pictures, size: int = 16) -> Path:
    write_dataset(folder, pictures, {"source": "test"}, size, 1, packed=True)
    return folder


class World:
    """Private and public data, a base, a base with an untrained embedding, and a cache."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = tiny_config(OPTIONS)
        self.private = write(root / "private", [*digits(60, 1, "train"), *digits(45, 2, "test")])
        self.public = write(root / "letters", letter_pictures(90, LETTERS, 0, 16, 1))
        self.base = tiny_model(self.config, classes=LETTERS)
        self.untrained = tiny_model(self.config, classes=DIGITS)
        self.faithful = write(root / "faithful", digits(60, 3, SPLIT))

    def evaluate(self, samples: Path, out: str = "out", cache: str = "cache", **changes):
        arguments = {"config": self.config, "public_folder": self.public} | changes
        return evaluate(
            samples_folder=samples,
            drawn=self.config.data.classes,
            covered=True,
            private_folder=self.private,
            base=self.base,
            untrained=self.untrained,
            adapters={},
            cache_folder=self.root / "public-cache" / cache,
            private_cache_folder=self.root / cache,
            out_folder=self.root / out,
            events=Events(),
            **arguments,
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def result(world):
    return world.evaluate(world.faithful, "faithful-out")


def test_samples_like_the_real_pictures_score_better_than_noise(world, result):
    generator = np.random.default_rng(0)
    noise = [
        Picture(f"{i}.png", DIGITS[i % 3], SPLIT, encode_png(generator.integers(0, 256, (16, 16, 1), dtype=np.uint8)))
        for i in range(60)
    ]
    worse = world.evaluate(write(world.root / "noise", noise), "noise-out").metrics
    good = result.metrics
    assert good["letter_frechet_distance"] < worse["letter_frechet_distance"] / 3
    assert good["accuracy"] > 0.8
    assert worse["accuracy"] < 0.6
    assert good["class_agreement"] > 0.8 > worse["class_agreement"]
    # these scores do not depend on the samples, so they are the same
    for name in ("reconstruction_letter_frechet_distance", "accuracy_train_on_real", "accuracy_public_only"):
        assert good[name] == worse[name]


def test_the_references_are_what_their_names_say(result):
    metrics = result.metrics
    assert metrics["accuracy_train_on_real"] > 0.8
    assert metrics["accuracy_public_only"] > 0.8
    assert metrics["accuracy_untrained_embedding"] < 0.7  # pictures of an untrained embedding teach no digits
    for name in ("accuracy", "accuracy_train_on_real", "accuracy_untrained_embedding", "accuracy_public_only"):
        assert metrics[f"{name}_low"] <= metrics[name] <= metrics[f"{name}_high"]
    assert metrics["accuracy_high"] - metrics["accuracy_low"] > 0.05  # 45 test pictures allow no narrower interval


def test_the_reconstruction_distance_is_that_of_decoded_latents_of_as_many_real_pictures(world, result):
    from dp_lora.data.pixels import to_pixels, to_uint8
    from dp_lora.evaluation.cache import Cache
    from dp_lora.evaluation.classifier import ClassifierTraining
    from dp_lora.evaluation.frechet import frechet_distance, statistics
    from dp_lora.evaluation.letter_features import letter_features

    real = read_dataset(world.private, DIGITS, "train").images(slice(None))
    with torch.no_grad():
        decoded = to_uint8(decode(world.base.vae, encode(world.base.vae, to_pixels(real))))
    letters = letter_features(
        world.public, LETTERS, ClassifierTraining(25, 0), Cache(world.root / "cache"), torch.device("cpu")
    )
    expected = frechet_distance(*(statistics([letters.features([images])]) for images in (decoded, real)))
    assert result.metrics["reconstruction_letter_frechet_distance"] == pytest.approx(expected, rel=1e-4)


def test_everything_computed_from_private_pictures_is_marked_private(world, result):
    assert result.private == set(result.metrics) - {"samples"}
    table = json.loads((world.root / "faithful-out" / "table.json").read_text())
    assert {row["metric"] for row in table if row["private"]} == {e.metric for e in result.measurements} - {"samples"}


def test_the_files_say_what_the_result_says(world, result):
    out = world.root / "faithful-out"
    assert json.loads((out / "metrics.json").read_text()) == result.metrics
    rows = list(csv.DictReader((out / "per_class.csv").open(encoding="utf-8")))
    assert [row["class"] for row in rows] == DIGITS
    assert sum(int(row["n"]) for row in rows) == 45
    assert sum(int(row["correct"]) for row in rows) / 45 == pytest.approx(result.metrics["accuracy"])
    assert np.mean([float(row["class_agreement"]) for row in rows]) == pytest.approx(result.metrics["class_agreement"])
    with Image.open(out / "confusion.png") as picture:
        assert picture.width > 200


def test_no_metric_is_called_fid_without_inception(result):
    assert not [name for name in result.metrics if "fid" in name or "kid" in name]


def test_references_are_made_once_and_shared_by_other_samples(world, result, monkeypatch):
    trained = []

    def counted(*arguments):
        trained.append(arguments[-1])
        return classifier_module.train_classifier(*arguments)

    monkeypatch.setattr(utility_module, "train_classifier", counted)
    monkeypatch.setattr("dp_lora.evaluation.letter_features.train_classifier", counted)
    monkeypatch.setattr(
        "dp_lora.evaluation.base_samples.draw_in_batches", lambda *arguments: pytest.fail("drawn again")
    )
    samples = write(world.root / "other", digits(60, 4, SPLIT))
    world.evaluate(samples)
    assert trained == ["classifier of samples"]


@pytest.mark.slow
def test_an_evaluation_repeats_exactly_with_an_empty_and_with_a_full_cache(world, result):
    again = world.evaluate(world.faithful, "again", cache="fresh")
    assert again.metrics == result.metrics
    assert world.evaluate(world.faithful, "again", cache="fresh").metrics == result.metrics


def test_only_what_comes_of_public_pictures_is_kept_outside_of_the_private_cache(world, result):
    kept = [path.name for path in (world.root / "public-cache/cache").iterdir()]
    assert kept
    assert all(name.startswith("letters-") for name in kept), kept


def test_other_test_pictures_or_steps_are_other_references(world, result):
    before = len(list((world.root / "cache").iterdir()))
    config = tiny_config(f"{OPTIONS} evaluation.classifier_steps=5")
    changed = world.evaluate(world.faithful, config=config)
    assert len(list((world.root / "cache").iterdir())) > before
    assert changed.metrics["accuracy_public_only"] != result.metrics["accuracy_public_only"]


def test_too_few_samples_are_refused_with_the_rule_and_nothing_is_written(world):
    few = write(world.root / "few", digits(29, 0, SPLIT))
    with pytest.raises(InputError, match=r"too few pictures.*at least 30.*evaluation.min_images"):
        world.evaluate(few, "few-out")
    assert not (world.root / "few-out").exists()


def test_mixed_sizes_are_refused(world):
    blank = encode_png(np.zeros((8, 8, 1), np.uint8))
    small = write(world.root / "small", [Picture(f"{i}.png", "0", SPLIT, blank) for i in range(30)], size=8)
    with pytest.raises(InputError, match=r"8 pixels and 1 channels.*has 16 and 1; sizes must not be mixed"):
        world.evaluate(small)


def test_samples_of_a_class_outside_the_config_are_refused_by_name(world):
    blank = encode_png(np.zeros((16, 16, 1), np.uint8))
    foreign = write(world.root / "foreign", [Picture(f"{i}.png", "Q", SPLIT, blank) for i in range(30)])
    with pytest.raises(InputError, match="'Q'"):
        world.evaluate(foreign)


def test_without_letters_and_without_inception_there_is_no_distance(world):
    with pytest.raises(InputError, match=r"inception_weights=null.*letters"):
        world.evaluate(world.faithful, public_folder=None)


def test_rendered_digits_are_no_reference_for_other_classes(world):
    config = tiny_config(f"{OPTIONS} data.classes=[0,1,cat]")
    with pytest.raises(InputError, match=r"public_reference=digits.*'cat'"):
        world.evaluate(world.faithful, config=config)


@pytest.mark.slow
def test_no_public_reference_leaves_that_number_out(world):
    config = tiny_config(f"{OPTIONS} evaluation.public_reference=null")
    assert "accuracy_public_only" not in world.evaluate(world.faithful, config=config).metrics


@pytest.mark.slow  # four roots of 2048 x 2048 matrices
def test_with_inception_weights_fid_and_kid_stand_beside_the_reconstruction_s(world, tmp_path):
    digest = write_stand_in(tmp_path / "weights.pt")
    weights = f"evaluation.inception_weights={tmp_path / 'weights.pt'} evaluation.inception_sha256={digest}"
    changes = {"config": tiny_config(f"{OPTIONS} {weights}"), "public_folder": None}
    metrics = world.evaluate(world.faithful, **changes).metrics
    assert {"fid", "kid", "reconstruction_fid", "reconstruction_kid"} <= set(metrics)
    assert "letter_frechet_distance" not in metrics
    assert 0 < metrics["fid"] < metrics["reconstruction_fid"]  # an untrained autoencoder
    assert world.evaluate(world.faithful, **changes).metrics == metrics


def test_larger_pictures_reach_classifiers_at_64_pixels_and_grey_reaches_colour(tmp_path):
    images = np.full((2, 128, 128, 3), 100, np.uint8)
    images[:, :, :64] = 200
    pictures = [Picture(f"{i}.png", "0", "train", encode_png(image)) for i, image in enumerate(images)]
    write_dataset(tmp_path / "large", pictures, {}, 128, 3, packed=False)
    small = utility_pictures(read_dataset(tmp_path / "large", ["0"], "train"))
    assert small.shape == (2, 64, 64, 3)
    assert (small[0, :, :30] == 200).all()
    assert (small[0, :, 34:] == 100).all()
    assert resized(small, 32, 1).shape == (2, 32, 32, 1)
    assert resized(resized(small, 32, 1), 32, 3).shape == (2, 32, 32, 3)


def test_a_confusion_matrix_of_many_or_long_class_names_is_drawn(tmp_path):
    generator = np.random.default_rng(0)
    for classes in (["left eye", "right eye"], [str(i) for i in range(100)]):
        n = len(classes)
        write_confusion(tmp_path / f"{n}.png", generator.integers(0, 50, (n, n)), classes)
        with Image.open(tmp_path / f"{n}.png") as picture:
            assert 200 < picture.width < 2500


def test_what_other_code_has_made_is_made_anew(tmp_path, monkeypatch):
    kept, values = cache.Cache(tmp_path), iter(range(3))

    def asked() -> dict:
        return kept.json("score", {"n": 1}, lambda: {"value": next(values)})

    assert asked() == asked() == {"value": 0}
    package = tmp_path / "dp_lora"
    shutil.copytree(ROOT / "dp_lora", package)
    monkeypatch.setattr(sources, "PACKAGE", package)
    assert asked() == {"value": 0}
    with (package / "sampling/ddim.py").open("a") as file:
        file.write("# changed\n")
    assert asked() == asked() == {"value": 1}
