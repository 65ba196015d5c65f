"""The Frechet distance agrees with closed forms and with clean-fid's own function; bad input is refused."""

import warnings

import numpy as np
import pytest

from dp_lora.errors import InputError
from dp_lora.evaluation.frechet import Statistics, frechet_distance, statistics


def gaussian(n, width, seed, scale=1.0, shift=0.0):
    generator = np.random.default_rng(seed)
    mixing = generator.standard_normal((width, width)) * scale
    return generator.standard_normal((n, width)) @ mixing + shift


def test_distance_of_gaussians_with_commuting_covariances_is_the_closed_form():
    one = Statistics(100, np.array([1.0, 2.0, 3.0]), np.diag([1.0, 4.0, 9.0]))
    two = Statistics(100, np.array([0.0, 2.0, 5.0]), np.diag([4.0, 4.0, 1.0]))
    # |m - m'|^2 + sum (s - s')^2
    assert frechet_distance(one, two) == pytest.approx(1 + 0 + 4 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2, rel=1e-12)


@pytest.mark.parametrize("n", [40, 400])  # 40 rows of 64 features: singular covariances
def test_distance_equals_clean_fid_s(n):
    from cleanfid.fid import fid_from_feats

    a, b = gaussian(n, 64, 0), gaussian(n + 10, 64, 1, 1.3, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = fid_from_feats(a, b)
    assert frechet_distance(statistics([a]), statistics([b])) == pytest.approx(expected, rel=1e-6)


def test_distance_is_symmetric_and_zero_to_itself():
    a, b = statistics([gaussian(50, 80, 0)]), statistics([gaussian(70, 80, 1)])
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-7)
    assert frechet_distance(a, a) < 1e-4 * np.trace(a.covariance)


def test_statistics_in_batches_are_those_of_the_whole_even_far_from_zero():
    rows = gaussian(1000, 12, 2, shift=1e6)
    streamed = statistics(np.split(rows, [1, 300, 300, 999]))
    assert streamed.n == 1000
    np.testing.assert_allclose(streamed.mean, rows.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(streamed.covariance, np.cov(rows, rowvar=False), rtol=1e-7, atol=1e-7)


def test_float32_features_are_summed_in_float64():
    rows = (gaussian(2000, 4, 3) + 4096).astype(np.float32)
    found = statistics(np.array_split(rows, 9))
    np.testing.assert_allclose(found.covariance, np.cov(rows.astype(np.float64), rowvar=False), rtol=1e-10)


def test_too_few_images_are_refused_with_the_rule():
    few, enough = statistics([gaussian(99, 3, 0)]), statistics([gaussian(100, 3, 1)])
    for pair in ((few, enough), (enough, few)):
        with pytest.raises(InputError, match=r"too few images.*at least 100.*evaluation.min_images"):
            frechet_distance(*pair, min_images=100)
    assert frechet_distance(enough, enough, min_images=100) >= 0


def test_nan_is_refused_in_features_and_in_statistics():
    rows = gaussian(20, 3, 0)
    rows[7, 1] = np.nan
    with pytest.raises(InputError, match="NaN"):
        statistics([rows])
    good = statistics([gaussian(20, 3, 0)])
    bad = Statistics(20, good.mean, np.full((3, 3), np.nan))
    with pytest.raises(InputError, match="NaN"):
        frechet_distance(good, bad)


def test_features_of_another_network_are_refused():
    with pytest.raises(InputError, match="width 3 and 4"):
        frechet_distance(statistics([gaussian(20, 3, 0)]), statistics([gaussian(20, 4, 0)]))


def test_one_image_has_no_statistics():
    with pytest.raises(InputError, match="1 images give no covariance"):
        statistics([gaussian(1, 3, 0)])
