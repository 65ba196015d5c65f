"""A sheet of private pictures as training sees them, with captions or classes: for the operator's eyes alone."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dp_lora.data.layout import Dataset, read_dataset
from dp_lora.errors import PRIVATE_PICTURE, private_names
from dp_lora.files import whole_file

PICTURES, COLUMNS = 40, 8  # most pictures on a sheet; most in a row
SIDE, GAP = 144, 12  # pixels of a picture on the sheet, and between two
LINES, LINE, POINTS = 4, 16, 12  # most lines of text below a picture; a line's height; the font's size


@private_names(PRIVATE_PICTURE)
def write_contact_sheet(dataset: Path, classes: list[str], path: Path) -> None:
    """Draw up to PICTURES pictures of a prepared dataset's training split, evenly spread over its rows, to a PNG file.

    Only its owner may read the file; keep it out of shared folders. Raises InputError as `read_dataset` does.
    """
    pictures = read_dataset(dataset, classes, "train")
    rows = np.unique(np.linspace(0, len(pictures) - 1, PICTURES).round().astype(int))
    columns, height = min(COLUMNS, len(rows)), SIDE + LINES * LINE + GAP
    size = (GAP + max(columns, 4) * (SIDE + GAP), 2 * LINE + GAP + -(-len(rows) // columns) * height)
    sheet = Image.new("RGB", size, "white")
    draw, letters = ImageDraw.Draw(sheet), font()
    draw.text((GAP, GAP // 2), f"private: pictures as they are trained, {pictures.size} pixels wide", "black", letters)
    for place, row in enumerate(rows):
        left, top = GAP + place % columns * (SIDE + GAP), 2 * LINE + place // columns * height
        sheet.paste(enlarged(pictures.images([row])[0]), (left, top))
        lines = _wrapped(_words_of(pictures, int(row)), letters)
        for line, text in enumerate(lines):
            draw.text((left, top + SIDE + line * LINE), text, "black", letters)
    with whole_file(path, private=True) as temporary:
        sheet.save(temporary)


def font() -> ImageFont.FreeTypeFont:
    """The font of a sheet of pictures."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", POINTS)


def enlarged(image: np.ndarray) -> Image.Image:
    """A picture uint8 (H, W, C) scaled for a sheet: SIDE pixels wide, RGB."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB")
    # do not blur the pixels of a small picture
    how = Image.Resampling.NEAREST if picture.width < SIDE else Image.Resampling.LANCZOS
    return picture.resize((SIDE, SIDE), how)


def _words_of(pictures: Dataset, row: int) -> str:
    captions = () if pictures.captions is None else pictures.captions[row]
    more = f" (+ {len(captions) - 1})" if len(captions) > 1 else ""
    label = f"[{pictures.classes[pictures.labels[row]]}] " if pictures.classes else ""
    return f"{label}{captions[0] if captions else ''}{more}"


def _wrapped(text: str, letters: ImageFont.FreeTypeFont) -> list[str]:
    """The text in at most LINES lines of SIDE pixels; a line without blanks breaks between letters."""
    lines = [""]
    for letter in " ".join(text.split()):
        if letters.getlength(lines[-1] + letter) > SIDE:
            # break at the line's last blank, if it has one
            head, blank, tail = lines[-1].rpartition(" ")
            lines[-1:] = [head, tail] if blank and letter != " " else [lines[-1], ""]
        if lines[-1] or letter != " ":
            lines[-1] += letter
    return [*lines[: LINES - 1], f"{lines[LINES - 1]}…"] if len(lines) > LINES else lines
