"""Nearest neighbours, precision and recall agree with all distances computed at once, and with known answers."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from dp_lora.evaluation import nearest as module
from dp_lora.evaluation.nearest import nearest, radii, within
from dp_lora.evaluation.precision_recall import precision_and_recall

CPU = torch.device("cpu")


@pytest.fixture
def small_blocks(monkeypatch):
    """Use blocks so small that each side has several, the last one not full."""
    monkeypatch.setattr(module, "ROWS", 16)
    monkeypatch.setattr(module, "OTHERS", 7)


def features(n, seed, shift=0.0):
    return np.random.default_rng(seed).normal(shift, 1, (n, 5)).astype(np.float32)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_those_of_all_distances_at_once(k):
    samples, real = features(70, 0, 0.7), features(50, 1)
    of_real, of_samples = (np.sort(cdist(rows, rows), axis=1)[:, k] for rows in (real, samples))
    across = cdist(samples, real)
    expected = (across <= of_real).any(axis=1).mean(), (of_samples >= across.T).any(axis=1).mean()
    assert min(expected) > 0
    assert max(expected) < 1
    assert precision_and_recall(samples, real, k, CPU) == expected


@pytest.mark.usefixtures("small_blocks")
def test_the_nearest_of_all_is_found_wherever_it_lies():
    rows, others = features(40, 0), features(33, 1)
    distance, place = nearest(rows, others, CPU)
    across = cdist(rows, others)
    np.testing.assert_array_equal(place, across.argmin(axis=1))
    np.testing.assert_allclose(distance, across.min(axis=1), rtol=1e-6)


@pytest.mark.usefixtures("small_blocks")
def test_samples_of_half_of_what_is_real_and_some_far_off_have_the_shares_that_were_put_in():
    line = np.arange(20, dtype=np.float32)[:, None]
    real = np.concatenate([line, line + 1000])
    samples = np.concatenate([line, line[:10] + 1e6])
    assert precision_and_recall(samples, real, 3, CPU) == (20 / 30, 20 / 40)
    assert precision_and_recall(real, real, 3, CPU) == (1.0, 1.0)


def test_no_picture_is_its_own_neighbour_and_copies_are_neighbours():
    line = np.array([[0], [0], [0], [5], [7]], np.float32)
    assert radii(line, 1, CPU).tolist() == [0, 0, 0, 2, 2]
    assert radii(line, 2, CPU).tolist() == [0, 0, 0, 5, 7]
    with pytest.raises(ValueError, match="5 rows have no 5-th"):
        radii(line, 5, CPU)


def test_distances_of_pixels_are_exact():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 3 * 64 * 64), dtype=np.uint8)
    other = pixels.copy()
    other[7, 0] ^= 1
    distance, place = nearest(pixels, other, CPU)
    assert distance.tolist() == [1.0 if i == 7 else 0.0 for i in range(30)]
    assert place.tolist() == list(range(30))


@pytest.mark.parametrize("width", [2, 2048, 3 * 64 * 64])
def test_a_block_holds_so_many_distances_and_values_whatever_the_number_of_pictures(monkeypatch, width):
    seen = []

    def stood_for(rows, others):
        seen.append((rows.shape, others.shape))
        return torch.ones(len(rows), len(others), dtype=torch.float64)

    monkeypatch.setattr(module, "_distances", stood_for)
    rows = np.zeros((9000, width), np.float32)
    few = rows[:100]
    for search in (
        lambda: nearest(few, rows, CPU),
        lambda: within(few, rows, np.ones(9000), CPU),
        lambda: radii(rows[:5000], 3, CPU),
    ):
        search()
    assert max(a[0] * b[0] for a, b in seen) <= module.ROWS * module.OTHERS
    assert max(max(np.prod(a), np.prod(b)) for a, b in seen) <= module.VALUES
