"""Stroke maps: a pen's path through each glyph of the fonts that matplotlib ships."""

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from skimage.morphology import skeletonize

FRAME = 64  # pixels of the stroke map, whatever the size of the pictures
LONG_SIDE = 44  # of the filled glyph, in pixels of the stroke map
PEN_SIDE = 40  # long side of the pen's path; with the ink around it a letter fills about 23 of 32 pixels, as MNIST's do
SUPERSAMPLING = 2  # the skeleton is taken on a finer raster, for smooth strokes
# pixels of the stroke map; shorter side branches of a skeleton are serifs and corner spurs, which nobody writes
SPUR = 9.0
SHORT_STROKES = "Qft4"  # tail, crossbars and leg are as short as a serif: remove only corner spurs
SHORT_SPUR = 4.0
DOTTED = "ij"  # a dot anywhere else is a typewriter's zero
# symbol fonts and the font of last resort: they hold no letters, or none in the letters' places
NOT_LETTERS = ("LastResort", "cmex", "cmsy", "Display", "NonUni", "Siz")
SQUARE = np.ones((3, 3), bool)  # the eight neighbours


@cache
def font_files() -> tuple[Path, ...]:
    """The text fonts of matplotlib (DejaVu, STIX, Computer Modern), sorted by name."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return tuple(p for p in sorted(folder.glob("*.ttf")) if not any(word in p.name for word in NOT_LETTERS))


@cache
def _characters(font: Path) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(font)).get_charmap())


def has_glyph(font: Path, character: str) -> bool:
    """Whether a font draws a character, not a box in its place."""
    return ord(character) in _characters(font)


def _raster(font: Path, character: str) -> np.ndarray:
    """The filled glyph, centred, long side LONG_SIDE * SUPERSAMPLING; bool (side, side)."""
    drawn = Image.new("L", (512, 512), 0)
    ImageDraw.Draw(drawn).text((128, 64), character, font=ImageFont.truetype(str(font), 256), fill=255)
    glyph = drawn.crop(drawn.getbbox())
    scale = LONG_SIDE * SUPERSAMPLING / max(glyph.size)
    glyph = glyph.resize((max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale))))
    side = FRAME * SUPERSAMPLING
    frame = Image.new("L", (side, side), 0)
    frame.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    return np.asarray(frame) > 96  # below one half: hairlines of book fonts must not break


def _neighbours(skeleton: np.ndarray) -> np.ndarray:
    """Number of set pixels among the eight around each pixel."""
    ring = np.ones((3, 3), int)
    ring[1, 1] = 0
    return ndimage.convolve(skeleton.astype(int), ring, mode="constant")


def prune(skeleton: np.ndarray, length: float, dots: bool) -> np.ndarray:
    """Remove end branches shorter than `length` pixels that hang on a junction, and dots unless `dots`; bool (h, w)."""
    around = _neighbours(skeleton)
    junctions = ndimage.binary_dilation(skeleton & (around >= 3), SQUARE) & skeleton
    branches, count = ndimage.label(skeleton & ~junctions, SQUARE)
    has_end, hangs = np.zeros(count + 1, bool), np.zeros(count + 1, bool)
    has_end[np.unique(branches[skeleton & (around <= 1)])] = True
    hangs[np.unique(branches[ndimage.binary_dilation(junctions, SQUARE)])] = True
    short = has_end & (np.bincount(branches.ravel(), minlength=count + 1) < length)
    if dots:
        short &= hangs
    short[0] = False
    # thin again: a junction that lost a branch is no longer a junction
    return skeletonize(skeleton & ~short[branches])


def _framed(distance: np.ndarray, skeleton: np.ndarray) -> np.ndarray:
    """Move and scale a distance map so that the skeleton's box is centred with long side PEN_SIDE; (FRAME, FRAME)."""
    box = [np.flatnonzero(skeleton.any(axis=1 - axis))[[0, -1]] for axis in (0, 1)]
    pixels = max(last - first for first, last in box) / PEN_SIDE  # fine pixels per pixel of the stroke map
    offsets = [(first + last) / 2 - pixels * (FRAME - 1) / 2 for first, last in box]
    scale = [pixels, pixels]
    return ndimage.affine_transform(distance, scale, offsets, (FRAME, FRAME), order=1, mode="nearest") / pixels


@cache
def stroke_map(font: Path, character: str) -> np.ndarray:
    """Distance to the glyph's skeleton, in pixels of the FRAME x FRAME map; float32 (FRAME, FRAME)."""
    spur = SHORT_SPUR if character in SHORT_STROKES else SPUR
    skeleton = prune(skeletonize(_raster(font, character)), spur * SUPERSAMPLING, character in DOTTED)
    return _framed(ndimage.distance_transform_edt(~skeleton), skeleton).astype(np.float32)
