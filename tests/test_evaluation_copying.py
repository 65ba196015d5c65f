"""The search for copies among samples finds training pictures, and no pictures that nobody trained on."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dp_lora.data.contact_sheet import GAP, LINE, SIDE
from dp_lora.data.layout import Picture, read_dataset, write_dataset
from dp_lora.data.letters import render_digits
from dp_lora.data.png import encode_png
from dp_lora.evaluation.cache import Cache
from dp_lora.evaluation.copying import NEAR, PAIRS, look_for_copies, write_distances, write_pairs
from dp_lora.evaluation.features import FeatureSets, FeatureSpace, PictureSets
from dp_lora.sampling import SPLIT
from tests.support.drawn_model import tiny_config, tiny_model

CLASSES = ["0", "1", "2"]


def of_means(batches, _description):
    """Features: the mean brightness of each quarter of the picture, stretched."""
    images = np.concatenate(list(batches)).astype(np.float32)
    quarters = images.reshape(len(images), 2, images.shape[1] // 2, 2, images.shape[2] // 2, -1)
    return quarters.mean(axis=(2, 4, 5)).reshape(len(images), 4)


SPACE = FeatureSpace("mean", "brightness of quarters", "v1", of_means)


def digits(n, seed):
    return render_digits(n, seed, size=16, classes=CLASSES)[0]


def written(folder, **splits):
    rows = [
        Picture(f"{split}-{i}.png", CLASSES[0], split, encode_png(image))
        for split, images in splits.items()
        for i, image in enumerate(images)
    ]
    write_dataset(folder, rows, {}, splits["train" if "train" in splits else SPLIT].shape[1], 1, packed=True)
    return folder


TRAINING = digits(60, 1)
HELD_OUT = digits(50, 2)
OF_BASE = np.concatenate([TRAINING[:3], digits(17, 9)])


@pytest.fixture
def looked(tmp_path):
    """A function that looks for copies among samples; it returns the result and the sets."""
    private = written(tmp_path / "private", train=TRAINING, test=HELD_OUT)
    real, test = (read_dataset(private, CLASSES, split) for split in ("train", "test"))
    base = tiny_model(tiny_config())

    def look(images, **changes):
        samples = read_dataset(written(tmp_path / "samples", **{SPLIT: images}), CLASSES, SPLIT)
        sets = PictureSets(samples, real, test, base, 10, Cache(tmp_path / "cache"))
        sets = replace(sets, **changes)
        return look_for_copies(FeatureSets(SPACE, sets), OF_BASE), sets

    return look


def values(copying):
    return {one.metric: one for one in copying.scores()}


def test_training_pictures_among_the_samples_are_found_and_counted(looked):
    almost = np.clip(TRAINING[10:14].astype(int) + 3, 0, 255).astype(np.uint8)
    fresh = digits(30, 3)
    found = values(looked(np.concatenate([TRAINING[:6], almost, fresh]))[0])
    assert found["exact_copies"].value == 6
    assert found["near_copies"].value >= 10
    for name in ("nearer_than_held_out", "nearer_than_held_out_pixels"):
        assert found[name].value >= 6 / 40
        assert found[name].low <= found[name].value <= found[name].high
    assert all(one.private for one in found.values())


def test_the_base_s_samples_are_judged_beside_the_fine_tuned_model_s(looked):
    found = values(looked(digits(50, 4))[0])
    # three of the base's samples are training pictures, and the rest nobody trained on
    assert found["near_copies_base"].value >= 3 > found["near_copies"].value
    for name in ("nearer_than_held_out_base", "nearer_than_held_out_pixels_base"):
        assert found[name].low <= 3 / 20 <= found[name].value <= found[name].high
        assert "share of 20 samples of the base nearer" in found[name].meaning


def test_samples_that_are_training_pictures_all_lie_nearer_than_held_out_ones(looked):
    copying, sets = looked(TRAINING)
    found = values(copying)
    assert found["exact_copies"].value == len(TRAINING)
    assert found["nearer_than_held_out"].value == found["nearer_than_held_out_pixels"].value == 1
    # a mutant that takes the training pictures for the held-out ones sees no copy
    mutant = values(looked(TRAINING, test=sets.real)[0])
    assert mutant["nearer_than_held_out"].value == mutant["nearer_than_held_out_pixels"].value == 0


def test_pictures_that_nobody_trained_on_are_as_near_as_held_out_ones(looked):
    found = values(looked(digits(50, 4))[0])
    assert found["exact_copies"].value == 0
    for name in ("nearer_than_held_out", "nearer_than_held_out_pixels"):
        assert found[name].low <= 0.05
        assert found[name].value <= 0.2


def test_pictures_that_are_equal_at_64_pixels_alone_are_no_exact_copies(tmp_path):
    blank = np.full((12, 128, 128, 1), 100, np.uint8)
    training = blank + np.arange(12, dtype=np.uint8)[:, None, None, None]
    samples = training.copy()
    samples[0, 0, 0] += 1  # the mean over neighbouring pixels hides this
    private = written(tmp_path / "private", train=training, test=training[:10])
    real, test = (read_dataset(private, CLASSES, split) for split in ("train", "test"))
    drawn = read_dataset(written(tmp_path / "samples", **{SPLIT: samples}), CLASSES, SPLIT)
    sets = PictureSets(drawn, real, test, tiny_model(tiny_config()), 10, Cache(tmp_path / "cache"))
    copying = look_for_copies(FeatureSets(SPACE, sets), samples)
    assert copying.exact == 11
    assert (copying.pixels.samples <= NEAR).all()


def test_the_pairs_are_the_nearest_ones_sample_left_training_picture_right(looked, tmp_path):
    # much brighter: the features, which are brightness, no longer find the copy, but pixels do
    brighter = np.clip(TRAINING[41:42].astype(int) + 25, 0, 255).astype(np.uint8)
    images = np.concatenate([digits(30, 3), TRAINING[40:41], brighter])
    copying, sets = looked(images)
    write_pairs(tmp_path / "pairs.png", copying, sets.samples, sets.real)
    assert (tmp_path / "pairs.png").stat().st_mode & 0o777 == 0o600
    with Image.open(tmp_path / "pairs.png") as sheet:
        pixels = np.asarray(sheet)
    in_features, in_pixels = copying.features, copying.pixels
    beside = {
        "features": in_features.samples / np.quantile(in_features.held_out, 0.01),
        "pixels": in_pixels.samples / np.quantile(in_pixels.held_out, 0.01),
    }
    order = np.argsort(np.minimum(*beside.values()), kind="stable")[:PAIRS]
    assert order[0] == 30
    rows = np.where(beside["features"] <= beside["pixels"], in_features.rows, in_pixels.rows)
    assert rows[30] == 40
    assert 31 in order
    assert rows[31] == 41
    side, columns = SIDE // 16 * 16, np.arange(16) * SIDE // 16 + 4
    for place, row in enumerate(order):
        left = GAP + place % 2 * (2 * SIDE + GAP // 2 + 2 * GAP)
        top = 3 * LINE + place // 2 * (SIDE + 2 * LINE + GAP)
        for at, image in ((left, images[row]), (left + SIDE + GAP // 2, TRAINING[rows[row]])):
            shown = pixels[top : top + side, at : at + side, 0]
            np.testing.assert_array_equal(shown[np.ix_(columns, columns)], image[..., 0])


def test_the_plot_is_its_owner_s_and_says_that_it_is_private(looked, tmp_path):
    copying, _ = looked(digits(30, 3))
    write_distances(tmp_path / "plot.png", copying)
    assert (tmp_path / "plot.png").stat().st_mode & 0o777 == 0o600
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.width > 800


def test_what_does_not_depend_on_the_samples_is_kept(looked, monkeypatch):
    copying, _ = looked(TRAINING[:20])
    calls = []
    monkeypatch.setattr(
        "dp_lora.evaluation.copying.nearest",
        lambda rows, others, device: calls.append(len(rows)) or (np.zeros(len(rows)), np.zeros(len(rows), np.int64)),
    )
    again, _ = looked(TRAINING[:20])
    assert calls == [20, 20, 20, 20]  # the samples', and the base's twenty, in features and in pixels
    np.testing.assert_array_equal(again.features.held_out, copying.features.held_out)
