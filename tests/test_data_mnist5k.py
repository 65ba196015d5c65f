"""The real digits: a fixed, stratified split, enlarged by interpolation."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from dp_lora.data import mnist5k
from dp_lora.data.layout import Picture
from dp_lora.data.png import decode_png
from dp_lora.errors import InputError

CLASSES = list("0123456789")


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    return list(mnist5k.mnist_pictures(CLASSES, 32, 1))


def test_split_is_400_and_100_of_each_class(pictures: list[Picture]) -> None:
    for label in CLASSES:
        splits = [picture.split for picture in pictures if picture.label == label]
        assert (splits.count("train"), splits.count("test")) == (400, 100)


def test_split_is_fixed(pictures: list[Picture]) -> None:
    test = ",".join(picture.file_name for picture in pictures if picture.split == "test")
    assert test.startswith("0002-0.png,0012-0.png,0015-0.png,0016-0.png,001")
    digest = hashlib.sha256(test.encode()).hexdigest()
    assert digest == "2fc0b80325f1937f7304f73fb07f947cd4e281a062fd30d4b64a16ae97ee91fa"


def test_no_digit_stands_on_both_sides(pictures: list[Picture]) -> None:
    assert len({picture.file_name for picture in pictures}) == len(pictures) == 5000
    train = {hashlib.sha256(picture.png).digest() for picture in pictures if picture.split == "train"}
    assert not [p.file_name for p in pictures if p.split == "test" and hashlib.sha256(p.png).digest() in train]


def test_digits_are_enlarged_not_framed(pictures: list[Picture]) -> None:
    images, labels = mnist5k._load()
    assert images.shape == (5000, 28, 28)
    for row in (0, 2500, 4999):
        assert pictures[row].label == CLASSES[labels[row]]
        found = decode_png(pictures[row].png, 32, 1)[..., 0]
        np.testing.assert_array_equal(found, np.asarray(Image.fromarray(images[row]).resize((32, 32), 2)))
    ink = np.stack([decode_png(picture.png, 32, 1)[..., 0] for picture in pictures[::25]]) > 50
    heights = [np.ptp(np.flatnonzero(image.any(1))) + 1 for image in ink]
    assert np.percentile(heights, 90) >= 22  # enlarging makes 23 of 32 pixels from 20 of 28; a border leaves 20


def test_fewer_classes_keep_their_split_and_others_are_refused(
    pictures: list[Picture], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = mnist5k._load()
    monkeypatch.setattr(mnist5k, "_load", lambda: loaded)
    fewer = list(mnist5k.mnist_pictures(["7", "1"], 32, 1))
    assert fewer == [picture for picture in pictures if picture.label in ("7", "1")]
    with pytest.raises(InputError, match="'10' is no digit"):
        list(mnist5k.mnist_pictures(["1", "10"], 32, 1))


def test_other_contents_of_the_package_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mnist5k, "SHA256", "0" * 64)
    with pytest.raises(InputError, match="other digits than expected"):
        mnist5k._load()
