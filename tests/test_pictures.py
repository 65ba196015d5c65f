"""README's strip and plot, drawn from small made-up data; `make pictures` draws them from real runs."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dp_lora.config import flatten, load
from dp_lora.data.layout import Picture, write_dataset
from dp_lora.data.png import encode_png
from dp_lora.grids import draw_grid
from dp_lora.tracking.provenance import param_text
from tests.pictures import cut_grid, newest, real_pictures, write_accuracy, write_strip

CLASSES, SIZE = 3, 32


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("size", [24, 32, 64])
def test_a_grid_is_cut_into_the_very_pictures_that_it_was_drawn_from(size):
    pictures = noise(CLASSES, 10, size, size, 3)
    grid = draw_grid(list(pictures), ["0", "1", "a long name"])
    assert np.array_equal(cut_grid(grid, CLASSES, size), pictures)
    with pytest.raises(ValueError, match="no grid of 4 rows"):
        cut_grid(grid, 4, size)


def test_the_strip_has_a_class_per_column_and_the_rows_of_each_name_below_each_other(tmp_path):
    pictures = {name: noise(CLASSES, 2, SIZE, SIZE, 3) for name in ("real", "eps 1", "no privacy")}
    write_strip(tmp_path / "strip.png", pictures)
    with Image.open(tmp_path / "strip.png") as strip:
        shown = np.asarray(strip)
    assert strip.height == 6 * 68 + 4
    left = strip.width - CLASSES * 68
    # third row, second column: the first picture of class 1 of the second name
    cell = shown[4 + 2 * 68 : 4 + 2 * 68 + 64 : 2, left + 68 : left + 68 + 64 : 2]
    assert np.array_equal(cell, pictures["eps 1"][1, 0])


def test_real_pictures_are_the_first_test_pictures_of_each_class(tmp_path):
    images = noise(12, SIZE, SIZE, 1)
    splits = ["train", "test", "test", "test"] * 3
    rows = [
        Picture(f"{i}.png", "ba"[i % 2], split, encode_png(image))
        for i, (image, split) in enumerate(zip(images, splits, strict=True))
    ]
    write_dataset(tmp_path / "data", rows, {}, SIZE, 1, packed=True)
    found = real_pictures(tmp_path / "data", ["a", "b"], 2)
    assert found.shape == (2, 2, SIZE, SIZE, 3)
    assert [[int(image[0, 0, 2]) for image in row] for row in found] == [
        [int(images[i, 0, 0, 0]) for i in one] for one in ((1, 3), (2, 6))
    ]


def run(eps, seed, accuracy, **overrides):
    params = {key: param_text(value) for key, value in flatten(load("mnist5k")).items()}
    params |= {"privacy.eps": param_text(eps), "experiment.seed": str(seed), "compute.devices": "2"} | overrides
    metrics = {"accuracy": accuracy, "accuracy_train_on_real": 0.984, "accuracy_public_only": 0.799}
    metrics["accuracy_untrained_embedding"] = 0.1
    return SimpleNamespace(data=SimpleNamespace(params=params, metrics=metrics))


def test_the_newest_run_per_epsilon_and_seed_counts_and_none_with_other_settings():
    runs = [run(1.0, 0, 0.8), run(1.0, 0, 0.7), run(math.inf, 1, 0.9), run(1.0, 1, 0.1, **{"sampling.eta": "0.0"})]
    found = newest(runs, load("mnist5k"))
    assert {key: one.data.metrics["accuracy"] for key, one in found.items()} == {(1.0, 0): 0.8, (math.inf, 1): 0.9}


def test_the_plot_has_the_size_of_the_readme(tmp_path):
    write_accuracy(tmp_path / "accuracy.png", {(1.0, 0): run(1.0, 0, 0.8), (5.0, 0): run(5.0, 0, 0.9)}, 1e-5)
    with Image.open(tmp_path / "accuracy.png") as picture:
        assert picture.size == (880, 550)
