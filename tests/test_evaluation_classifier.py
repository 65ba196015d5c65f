"""The classifier that measures utility: it learns classes, depends on its seed alone, and states an interval."""

import numpy as np
import pytest
import torch

import dp_lora.evaluation.classifier as classifier_module
from dp_lora.data.pixels import to_pixels
from dp_lora.errors import InputError
from dp_lora.evaluation.classifier import (
    Classifier,
    ClassifierTraining,
    augment,
    load_classifier,
    predict,
    save_classifier,
    train_classifier,
)
from dp_lora.evaluation.intervals import share_interval
from dp_lora.evaluation.utility import Score, score
from dp_lora.learning_rate import lr_factor

CPU = torch.device("cpu")


def bars(n, size=16, channels=1, seed=0):
    """Pictures of an upright bar (class 0), a flat bar (1) or a dot (2) on noise."""
    generator = np.random.default_rng(seed)
    labels = np.arange(n, dtype=np.int64) % 3
    images = generator.integers(0, 60, (n, size, size, channels), dtype=np.uint8)
    middle, wide = slice(size // 2 - 2, size // 2 + 2), slice(2, size - 2)
    for image, label in zip(images, labels, strict=True):
        rows, columns = ((wide, middle), (middle, wide), (middle, middle))[label]
        image[rows, columns] = 255
    return images, labels


@pytest.mark.parametrize(("size", "channels"), [(16, 1), pytest.param(40, 3, marks=pytest.mark.slow)])
def test_it_learns_shapes_of_any_size_in_grey_and_colour(size, channels):
    images, labels = bars(120, size, channels)
    network = train_classifier(images, labels, 3, ClassifierTraining(30, 0), CPU)
    test_images, test_labels = bars(60, size, channels, seed=1)
    result = score(network, test_images, test_labels, CPU)
    assert result.n == 60
    assert result.accuracy > 0.9
    logits, features = predict(network, test_images, CPU)
    assert logits.shape == (60, 3)
    assert features.shape == (60, classifier_module.FEATURES)


def test_it_learns_nothing_from_labels_without_a_meaning():
    images, labels = bars(120)
    shuffled = np.random.default_rng(0).permutation(labels)
    network = train_classifier(images, shuffled, 3, ClassifierTraining(30, 0), CPU)
    test_images, test_labels = bars(60, seed=1)
    assert score(network, test_images, test_labels, CPU).accuracy < 0.8


def test_equal_seed_gives_equal_weights_and_leaves_the_caller_s_random_state_alone():
    images, labels = bars(40)
    state = torch.random.get_rng_state()
    first, again, other = (train_classifier(images, labels, 3, ClassifierTraining(2, seed), CPU) for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    pairs = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not any(torch.equal(a, c) for a, _, c in pairs if a.ndim > 1)


def test_a_stored_classifier_predicts_the_same(tmp_path):
    images, labels = bars(40, channels=3)
    network = train_classifier(images, labels, 3, ClassifierTraining(2, 0), CPU)
    save_classifier(tmp_path / "c.safetensors", network)
    read = load_classifier(tmp_path / "c.safetensors")
    assert np.array_equal(predict(network, images, CPU)[0], predict(read, images, CPU)[0])


def test_augmentation_moves_every_image_by_its_own_amounts_within_its_bounds():
    picture = np.zeros((1, 32, 32, 1), np.uint8)
    picture[0, 14:18, 14:18] = 255
    pixels = to_pixels(np.repeat(picture, 200, axis=0))
    changed = augment(pixels, torch.Generator().manual_seed(0))
    assert changed.shape == pixels.shape
    mass = (changed[:, 0] + 1).clamp(min=0)
    ramp = torch.arange(32.0)
    x = (mass.sum(1) * ramp).sum(1) / mass.sum((1, 2)) - 15.5
    y = (mass.sum(2) * ramp).sum(1) / mass.sum((1, 2)) - 15.5
    limit = 32 * classifier_module.SHIFT * (1 + classifier_module.SCALE) * 1.4 + 0.1
    assert max(x.abs().max(), y.abs().max()) < limit
    assert min(x.std(), y.std()) > 32 * classifier_module.SHIFT / 3
    assert len(torch.unique(x)) > 190


def test_augmentation_of_no_amount_is_the_image_itself(monkeypatch):
    for name in ("ROTATION", "SCALE", "SHEAR", "SHIFT"):
        monkeypatch.setattr(classifier_module, name, 0.0)
    pixels = to_pixels(bars(5)[0])
    torch.testing.assert_close(augment(pixels, torch.Generator().manual_seed(0)), pixels, atol=1e-5, rtol=0)


def test_every_image_is_seen_equally_often():
    rows = torch.cat(list(classifier_module._epochs(50, 25, torch.Generator().manual_seed(0))))
    counts = torch.bincount(rows, minlength=50)
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # Newcombe 1998 (Statistics in Medicine 17), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_wilson_s(correct, n, low, high):
    assert share_interval(correct, n) == pytest.approx((low, high), abs=5e-5)


def test_confusion_counts_real_classes_in_rows_and_predictions_in_columns():
    images, labels = bars(9)
    network = Classifier(1, 3)
    torch.nn.init.zeros_(network.head.weight)
    network.head.bias.data = torch.tensor([0.0, 5.0, 0.0])
    result = score(network, images, labels, CPU)
    assert result.confusion.tolist() == [[0, 3, 0]] * 3
    assert (result.correct, result.n) == (3, 9)
    assert Score.from_json(result.to_json()).confusion.tolist() == result.confusion.tolist()


def test_images_without_labels_are_refused():
    images, labels = bars(9)
    with pytest.raises(InputError, match="9 images and 8 labels"):
        train_classifier(images, labels[:8], 3, ClassifierTraining(1, 0), CPU)


def test_the_classifier_learns_at_the_rate_of_the_project_s_one_schedule(monkeypatch):
    def trained():
        return train_classifier(*bars(128, size=8), 3, ClassifierTraining(20, 0), CPU).head.weight.detach()

    asked = []

    def rate(*arguments, **options):
        asked.append(lr_factor(*arguments, **options))
        return asked[-1]

    monkeypatch.setattr(classifier_module, "lr_factor", rate)
    learnt = trained()
    assert asked[:2] == pytest.approx([0.5, 1], abs=0.01)
    assert asked[1:] == sorted(asked[1:], reverse=True)
    assert 0 < asked[-1] < 0.01
    # at a rate of 0 nothing is learnt: the weights keep the spread that they start with
    monkeypatch.setattr(classifier_module, "lr_factor", lambda *_, **__: 0.0)
    untouched = trained()
    assert untouched.std().item() == pytest.approx(0.01, rel=0.2)
    assert not torch.equal(untouched, learnt)
