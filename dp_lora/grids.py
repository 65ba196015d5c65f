"""Pictures of pictures: a labelled grid as one PNG, small images enlarged without blur."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dp_lora.files import whole_file

CELL = 64  # pixels: images are enlarged by a whole factor until they are at least this wide
GAP = 4
FONT_SIZE = 18
MAX_ROWS = 40  # what a reader still scrolls through; a grid of 1,000 classes shows the first ones


def write_grid(path: Path, rows: Sequence[NDArray[np.uint8]], names: Sequence[str]) -> None:
    """Write one PNG with a row of images per entry of `rows` and its name at the left.

    Each row is uint8 (n, H, W, C), C 1 or 3; all share H, W and C, n may differ. Rows after the first 40 are left
    out, and a last line says how many.
    """
    with whole_file(Path(path)) as temporary:
        draw_grid(rows, names).save(temporary)


def draw_grid(rows: Sequence[NDArray[np.uint8]], names: Sequence[str]) -> Image.Image:
    """The picture that `write_grid` saves, RGB."""
    if not rows or len(rows) != len(names):
        raise ValueError(f"a grid needs one name per row: {len(rows)} rows, {len(names)} names")
    left_out = max(0, len(rows) - MAX_ROWS)
    rows, names = rows[:MAX_ROWS], names[:MAX_ROWS]
    height, width = rows[0].shape[1:3]
    scale = max(1, -(-CELL // width))
    # DejaVu has most alphabets: class names are the user's own
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", FONT_SIZE)
    margin = 2 * GAP + max(int(font.getlength(name)) for name in names)
    step_x, step_y = width * scale + GAP, height * scale + GAP
    columns = max(len(row) for row in rows)
    footer = FONT_SIZE + 3 * GAP if left_out else 0
    canvas = Image.new("RGB", (margin + columns * step_x, len(rows) * step_y + GAP + footer), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (row, name) in enumerate(zip(rows, names, strict=True)):
        top = GAP + i * step_y
        draw.text((margin - GAP, top + height * scale / 2), name, fill="black", font=font, anchor="rm")
        for j, image in enumerate(row):
            picture = Image.fromarray(np.ascontiguousarray(np.broadcast_to(image, (height, width, 3))))
            picture = picture.resize((width * scale, height * scale), Image.Resampling.NEAREST)
            canvas.paste(picture, (margin + j * step_x, top))
    if left_out:
        draw.text((GAP, len(rows) * step_y + GAP), f"and {left_out} more rows", fill="black", font=font)
    return canvas
