"""One form for all figures: sizes, colours for the colour-blind, and SVG that follows the page's dark mode."""

import io
import re
from html import escape

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, without those that are hard to read on white, such as yellow
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v")
LINES = ("-", "--", "-.", ":", (0, (5, 1)))
INK, FAINT, PAPER = "#1B1C1E", "#8A8D91", "#FFFFFE"
# a colour of a figure -> the page's variable, which has another value in dark mode
VARIABLES = {INK: "ink", FAINT: "faint", PAPER: "paper"} | {colour: f"c{i}" for i, colour in enumerate(COLOURS)}
WIDTH, HEIGHT = 4.7, 3.3  # inches; on a phone 390 pixels wide the letters keep four fifths of their size


def figure(width: float = WIDTH, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure with one axes: two spines, and faint horizontal grid lines."""
    made = Figure(figsize=(width, height), dpi=110, layout="constrained")
    axes = made.add_subplot()
    axes.set_facecolor("none")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(INK)
    axes.tick_params(colors=INK, labelsize=11)
    axes.xaxis.label.set(color=INK, size=11)
    axes.yaxis.label.set(color=INK, size=11)
    axes.grid(visible=True, axis="y", color=FAINT, alpha=0.35, linewidth=0.6)
    axes.set_axisbelow(True)
    return made, axes


def svg(made: Figure, name: str, label: str) -> str:
    """The figure as an SVG element for a page, with text as text.

    `name` keeps its ids apart from other figures' ids; a screen reader reads `label`. Colours become the page's
    variables (VARIABLES), so that the figure stays legible in dark mode.
    """
    made.patch.set_alpha(0.0)
    written = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):  # savefig alone reads these
        made.savefig(written, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # ids repeat from figure to figure, and a page allows none twice
    for colour, variable in VARIABLES.items():
        text = re.sub(colour, f"var(--{variable})", text, flags=re.IGNORECASE)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
