"""Letters and digits that look handwritten: pen paths of printed fonts, warped, and inked with a pen of changing width.

White ink on black. Everything is drawn from one seed: same seed, same bytes.
"""

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from dp_lora.data.fonts import FRAME, font_files, has_glyph, stroke_map
from dp_lora.data.layout import Picture
from dp_lora.data.png import encode_png
from dp_lora.errors import InputError

BATCH = 500  # pictures rendered at a time
# geometry at distortion 1.0, uniform +- around its mean; lengths in units where the frame is [-1, 1]
ROTATION = 12.0  # degrees
SHEAR, SHEAR_RANGE = 0.08, 0.3  # writing leans to the right
SCALE_X, SCALE_Y = 0.22, 0.1
SHIFT, FIT = 0.06, 0.08  # of the finished letter: its offset, and its relative change of size
ELASTIC = ((4, 0.085), (7, 0.02))  # knots of a smooth random field along each side, and its standard deviation
WIDTHS = (1.4, 3.9)  # of the stroke in pixels of a 32 x 32 picture, equal to its half width in pixels of the stroke map
MODULATION = 0.25  # the pen's pressure: share of the width, smooth along the stroke
SOFTNESS = 0.75  # of the ink's edge, in pixels of the stroke map
GLYPH = 20 / 28  # long side of a letter with its ink, as a share of the frame: the published value of MNIST
MARGIN, CANVAS = 1.5, 48  # warp letters on a canvas MARGIN frames and CANVAS pixels wide, then fit them to the frame
PATH = 1.4  # pixels of the stroke map: points closer to the pen's path count as on it

CASES = ("capital", "small")
DIGITS = "0123456789"
STANDIN_TRAIN, STANDIN_TEST, STANDIN_DISTORTION = 4000, 1000, 1.3
FONTS_SOURCE = {
    "origin": "rendered from the fonts that matplotlib ships: DejaVu, STIX, Computer Modern (BaKoMa)",
    "licence": "Bitstream Vera and Arev licences (DejaVu), STIX Font licence, BaKoMa licence; the pictures: Apache-2.0",
}


def letter_pictures(n: int, classes: Sequence[str], seed: int, size: int, channels: int) -> Iterator[Picture]:
    """n letters, classes in turn, both cases at random, all fonts that have the letter; all in split train.

    `classes`: any of A to Z, and letters of other scripts as `script-name`, such as greek-sigma and cyrillic-che.
    """
    forms = [letter_forms(name) for name in classes]
    return _pictures(n, classes, forms, font_files(), _generator(seed, "letters"), size, channels, 1.0, "train")


def letter_forms(name: str) -> str:
    """The capital and the small letter of a class of letters, by Unicode's names; InputError for any other class."""
    script, dash, letter = name.rpartition("-")
    try:
        if name != (name.lower() if dash else name.upper()) or bool(dash) != bool(script):
            raise KeyError(name)  # a class has one name
        return "".join(unicodedata.lookup(f"{script or 'latin'} {case} letter {letter}") for case in CASES)
    except KeyError:
        raise InputError(
            f"public.classes: {name!r} is no letter; the source letters has the classes A to Z, and letters of other "
            "scripts by Unicode's names, such as greek-sigma and cyrillic-che"
        ) from None


def digit_pictures(classes: Sequence[str], size: int, channels: int) -> Iterator[Picture]:
    """The public stand-in for private digits: 4,000 for training from DejaVu and Computer Modern, 1,000 for testing
    from the other fonts, classes in turn, distorted more than the letters. `classes`: any of 0 to 9.

    One fixed dataset, as private digits are: experiment.seed changes the training, not the data.
    """
    _check_digits(classes)
    train = tuple(font for font in font_files() if font.name.startswith(("DejaVu", "cm")))
    test = tuple(font for font in font_files() if font not in train)
    for split, n, fonts in (("train", STANDIN_TRAIN, train), ("test", STANDIN_TEST, test)):
        generator = _generator(0, f"digits {split}")
        yield from _pictures(n, classes, classes, fonts, generator, size, channels, STANDIN_DISTORTION, split)


def render_digits(
    n: int, seed: int, size: int = 32, channels: int = 1, classes: Sequence[str] = DIGITS
) -> tuple[np.ndarray, np.ndarray]:
    """Public pictures of digits from all fonts; uint8 (n, size, size, channels), int64 (n,): positions in `classes`."""
    _check_digits(classes)
    batches = list(_render(n, classes, font_files(), _generator(seed, "reference"), size, 1.0))
    images = np.concatenate([images for images, _ in batches])[..., None]
    return np.repeat(images, channels, axis=-1), np.concatenate([labels for _, labels in batches])


def _check_digits(classes: Sequence[str]) -> None:
    for name in classes:
        if name not in list(DIGITS):
            raise InputError(f"data.classes: {name!r} is no digit; rendered digits have the classes 0 to 9")


def _pictures(
    n: int,
    classes: Sequence[str],
    forms: Sequence[str],
    fonts: Sequence[Path],
    generator: np.random.Generator,
    size: int,
    channels: int,
    distortion: float,
    split: str,
) -> Iterator[Picture]:
    number = 0
    for images, labels in _render(n, forms, fonts, generator, size, distortion):
        for image, label in zip(images, labels, strict=True):
            name = f"{split}-{number:06d}-{classes[label]}.png"
            yield Picture(name, classes[label], split, encode_png(np.repeat(image[..., None], channels, axis=-1)))
            number += 1


def _render(
    n: int, forms: Sequence[str], fonts: Sequence[Path], generator: np.random.Generator, size: int, distortion: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of pictures uint8 (m, size, size) and labels int64 (m,); a picture has any character of its form."""
    for start in range(0, n, BATCH):
        labels = np.arange(start, min(start + BATCH, n)) % len(forms)
        drawn = generator.integers(len(fonts), size=len(labels)).tolist()
        characters = [forms[label][generator.integers(len(forms[label]))] for label in labels.tolist()]
        having = {character: [font for font in fonts if has_glyph(font, character)] for character in set(characters)}
        chosen = [
            having[character][place * len(having[character]) // len(fonts)]
            for place, character in zip(drawn, characters, strict=True)
        ]
        maps = np.stack([stroke_map(font, character) for font, character in zip(chosen, characters, strict=True)])
        yield _ink(torch.from_numpy(maps), generator, size, distortion), labels


def _generator(seed: int, purpose: str) -> np.random.Generator:
    """A separate random stream for each purpose of one seed."""
    return np.random.default_rng([seed, int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8])])


@cache
def _spline(cells: int, size: int) -> torch.Tensor:
    """Bicubic interpolation from `cells` knots to `size` pixels as a matrix (size, cells)."""
    knots = torch.eye(cells)[None, :, :, None]
    return functional.interpolate(knots, (size, 1), mode="bicubic", align_corners=True)[0, :, :, 0].T.contiguous()


def _smooth(knots: np.ndarray, size: int) -> torch.Tensor:
    """Smooth fields through knots (..., cells, cells); float32 (..., size, size)."""
    spline = _spline(knots.shape[-1], size)
    return spline @ torch.from_numpy(knots).float() @ spline.T


def _affine(generator: np.random.Generator, n: int, distortion: float) -> torch.Tensor:
    """Linear maps from the picture to the stroke map; float32 (n, 2, 2)."""

    def spread(size: float) -> np.ndarray:
        return generator.uniform(-size, size, n) * distortion

    angle, shear = np.deg2rad(spread(ROTATION)), SHEAR + spread(SHEAR_RANGE)
    x, y = 1 + spread(SCALE_X), 1 + spread(SCALE_Y)
    cos, sin = np.cos(angle), np.sin(angle)
    rows = [[cos / x, (shear * cos - sin) / x], [sin / y, (shear * sin + cos) / y]]
    return torch.from_numpy(np.stack([np.stack(row, -1) for row in rows], 1)).float()


def _warp(generator: np.random.Generator, n: int, distortion: float) -> torch.Tensor:
    """Each point of a canvas of MARGIN frames -> its stroke-map place; (n, CANVAS, CANVAS, 2), frame = [-1, 1]."""
    matrix = MARGIN * functional.pad(_affine(generator, n, distortion), (0, 1))
    warped = functional.affine_grid(matrix, [n, 1, CANVAS, CANVAS], align_corners=False)
    for cells, amplitude in ELASTIC:
        field = _smooth(generator.standard_normal((n, 2, cells, cells)), CANVAS)
        warped = warped + distortion * amplitude * field.permute(0, 2, 3, 1)
    return warped


def _extent(near: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre and half length of the range of true values; bool (n, CANVAS) -> (n,), (n,), frame = [-1, 1]."""
    ramp = MARGIN * (2 * torch.arange(CANVAS) + 1 - CANVAS) / CANVAS
    last = torch.where(near, ramp, -MARGIN).amax(1)
    first = torch.where(near, ramp, MARGIN).amin(1)
    return (first + last) / 2, (last - first) / 2


def _fitted(
    maps: torch.Tensor, warped: torch.Tensor, half: torch.Tensor, shift: torch.Tensor, size: int
) -> torch.Tensor:
    """Cut the picture out of the canvas so that the pen's path has half length `half` (n,); (n, size, size, 2)."""
    near = functional.grid_sample(maps[:, None], warped, padding_mode="border", align_corners=False)[:, 0] < PATH
    (x, half_x), (y, half_y) = _extent(near.any(1)), _extent(near.any(2))
    zoom = torch.maximum(half_x, half_y) / half
    centre = torch.stack([x, y], -1) - shift * zoom[:, None]
    window = torch.cat([torch.eye(2).expand(len(maps), 2, 2) * zoom[:, None, None], centre[..., None]], -1) / MARGIN
    places = functional.affine_grid(window, [len(maps), 1, size, size], align_corners=False)
    cut = functional.grid_sample(warped.permute(0, 3, 1, 2), places, padding_mode="border", align_corners=False)
    return cut.permute(0, 2, 3, 1)


def _ink(maps: torch.Tensor, generator: np.random.Generator, size: int, distortion: float) -> np.ndarray:
    """Warp stroke maps (n, FRAME, FRAME), fit them into the frame and ink them; uint8 (n, size, size)."""
    n = len(maps)
    warped = _warp(generator, n, distortion)
    width = torch.from_numpy(generator.uniform(*WIDTHS, n)).float()
    box = GLYPH * torch.from_numpy(1 + generator.uniform(-FIT, FIT, n) * distortion).float()
    shift = torch.from_numpy(generator.uniform(-SHIFT, SHIFT, (n, 2)) * distortion).float()
    grid = _fitted(maps, warped, box - 2 * width / FRAME, shift, size)
    # grid_sample gives 0 beyond the map: after the shift such a point is FRAME pixels from the pen
    distance = functional.grid_sample(maps[:, None] - FRAME, grid, align_corners=False)[:, 0] + FRAME
    # undo the warp's stretching of distances: a pen is equally wide in large and in small parts of a letter
    along, across = torch.gradient(grid, dim=(1, 2))
    area = (along[..., 0] * across[..., 1] - along[..., 1] * across[..., 0]).abs() * (size / 2) ** 2
    distance = distance / area.sqrt().clamp(0.5, 2)
    width = width[:, None, None] * (1 + MODULATION * _smooth(generator.uniform(-1, 1, (n, 4, 4)), size))
    return (255 * torch.sigmoid((width - distance) / SOFTNESS)).round().to(torch.uint8).numpy()
