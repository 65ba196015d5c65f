"""Rendered letters and digits depend on one seed; they are balanced, legible, and as large as handwritten digits."""

import hashlib

import numpy as np
import pytest
import torch

from dp_lora.data import letters
from dp_lora.data.fonts import font_files, has_glyph, stroke_map
from dp_lora.data.letters import digit_pictures, letter_pictures, render_digits
from dp_lora.data.png import decode_png
from dp_lora.errors import InputError

CLASSES = list("ABEGHKMRST")


def _bytes(seed: int) -> str:
    pictures = letter_pictures(60, ["A", "Q", "T"], seed, 32, 1)
    return hashlib.sha256(b"".join(picture.png for picture in pictures)).hexdigest()


def test_same_seed_same_bytes_whatever_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = _bytes(3)
        torch.set_num_threads(2)
        assert _bytes(3) == first
        assert _bytes(4) != first
    finally:
        torch.set_num_threads(threads)


def test_letters_leave_the_global_generators_alone() -> None:
    state, numpy_state = torch.get_rng_state(), str(np.random.get_state())
    _bytes(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert str(np.random.get_state()) == numpy_state


def test_symbol_fonts_are_left_out_and_every_font_has_every_letter() -> None:
    names = [font.name for font in font_files()]
    assert len(names) == 22
    assert not [name for name in names if any(word in name for word in ("LastResort", "cmex", "cmsy", "Siz", "NonUni"))]
    for font in font_files():
        for character in "Aj8":
            path = stroke_map(font, character) < 1
            rows, columns = np.flatnonzero(path.any(1)), np.flatnonzero(path.any(0))
            assert 38 <= max(np.ptp(rows), np.ptp(columns)) <= 43


def test_classes_are_the_ones_asked_for_and_balanced() -> None:
    pictures = list(letter_pictures(9, ["X", "B", "K"], 0, 16, 3))
    assert [picture.label for picture in pictures] == ["X", "B", "K"] * 3
    assert {picture.split for picture in pictures} == {"train"}
    assert len({picture.file_name for picture in pictures}) == 9
    assert decode_png(pictures[0].png, 16, 3).shape == (16, 16, 3)
    for classes in (["A", "a"], ["AB"], ["7"], ["É"], ["Greek-sigma"], ["greek-7"], ["sigma"], ["-A"], ["greek-"]):
        with pytest.raises(InputError, match=r"public\.classes"):
            letter_pictures(9, classes, 0, 16, 1)


def test_letters_of_other_scripts_are_drawn_from_the_fonts_that_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    real = letters.stroke_map
    monkeypatch.setattr(
        letters, "stroke_map", lambda font, character: drawn.append((font, character)) or real(font, character)
    )
    pictures = list(letter_pictures(120, ["greek-sigma", "cyrillic-che", "A"], 0, 16, 1))
    assert {picture.label for picture in pictures} == {"greek-sigma", "cyrillic-che", "A"}
    assert {character for _, character in drawn} == set("ΣσЧчAa")
    assert all(has_glyph(font, character) for font, character in drawn)
    # Computer Modern has no Cyrillic
    assert not any(font.name.startswith("cm") for font, character in drawn if character in "Чч")
    assert len({font for font, character in drawn if character in "Чч"}) > 8
    assert any(font.name.startswith("cm") for font, character in drawn if character in "Aa")


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    images, labels = render_digits(1500, seed=0)
    return images[..., 0], labels


def test_digits_are_white_on_black_and_as_large_as_mnists(digits: tuple[np.ndarray, np.ndarray]) -> None:
    images, _ = digits
    assert images.dtype == np.uint8
    assert images.max() > 250
    assert 0.08 < images.mean() / 255 < 0.18  # thin white strokes
    assert images[:, [0, -1]].max() < 128  # the border stays empty
    ink = images > 127
    sides = [max(np.ptp(np.flatnonzero(i.any(axis))) + 1 for axis in (0, 1)) for i in ink if i.any()]
    assert 21 <= np.mean(sides) <= 25  # MNIST's 20 of 28 pixels are 22.9 of 32
    soft = ((images > 30) & (images < 225)).sum() / (images > 30).sum()
    assert 0.2 < soft < 0.85  # edges are neither jagged nor blurred


def _neighbour_accuracy(images: np.ndarray, labels: np.ndarray, known: int) -> float:
    """Share of the pictures after the first `known` whose nearest picture among these has their class."""
    flat = images.reshape(len(images), -1).astype(np.float32)
    before, after = flat[:known], flat[known:]
    distance = (before**2).sum(1)[None] - 2 * after @ before.T
    return float((labels[:known][distance.argmin(1)] == labels[known:]).mean())


def test_digits_are_legible_to_a_nearest_neighbour(digits: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = digits
    assert _neighbour_accuracy(images, labels, 1200) > 0.75
    shuffled = np.random.default_rng(0).permutation(labels)
    assert _neighbour_accuracy(images, shuffled, 1200) < 0.25


def test_letters_are_legible_to_a_nearest_neighbour() -> None:
    pictures = list(letter_pictures(1200, CLASSES, 1, 32, 1))
    images = np.stack([decode_png(picture.png, 32, 1) for picture in pictures])
    labels = np.array([CLASSES.index(picture.label) for picture in pictures])
    assert _neighbour_accuracy(images, labels, 1000) > 0.5  # chance gives 0.1; upper and lower case are one class


def test_stand_in_tests_on_fonts_that_it_does_not_train_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(letters, "STANDIN_TRAIN", 40)
    monkeypatch.setattr(letters, "STANDIN_TEST", 20)
    used: dict[str, set] = {}
    rendered = letters._render

    def spy(n, forms, fonts, generator, size, distortion):
        used["test" if n == 20 else "train"] = set(fonts)
        assert distortion == 1.3
        return rendered(n, forms, fonts, generator, size, distortion)

    monkeypatch.setattr(letters, "_render", spy)
    pictures = list(digit_pictures(list("0123456789"), 32, 1))
    assert [picture.split for picture in pictures] == ["train"] * 40 + ["test"] * 20
    assert used["train"].isdisjoint(used["test"])
    assert used["train"] | used["test"] == set(font_files())
    assert len({picture.file_name for picture in pictures}) == 60
    with pytest.raises(InputError, match="'A' is no digit"):
        list(digit_pictures(["1", "A"], 32, 1))
    with pytest.raises(InputError, match="'10' is no digit"):
        render_digits(4, 0, classes=["1", "10"])
