"""The report's plots: a score against epsilon or another setting, epsilon over steps, bounds, time."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from dp_lora.study.comparisons import NO_PRIVACY
from dp_lora.study.drawing import COLOURS, FAINT, HEIGHT, INK, LINES, MARKERS, PAPER, WIDTH, figure
from dp_lora.study.statistics import Limits, Mean, Spread, mean, spread

BEYOND = 0.5  # decades from the largest epsilon to where no privacy stands, behind the break of the axis
TEXT = 11
PERCENT: Limits = (0.0, 100.0)
NEAR = 0.08  # share of the height in which two texts overlap


@dataclass(frozen=True)
class Series:
    """Values, one per seed, at each place of the axis: an epsilon (inf: no privacy), another number, or words."""

    values: Mapping[float | str, Sequence[float]]
    name: str = ""  # beside its last point; empty: the only one
    pool: Spread | None = None  # of the seeds; None: that of these values

    def means(self, limits: Limits) -> dict[float | str, Mean]:
        """The mean at each place."""
        pool = self.pool or spread(self.values.values())
        return {at: mean(values, limits, pool) for at, values in self.values.items()}


@dataclass(frozen=True)
class Mark:
    """A published figure of another system: a named point."""

    name: str
    at: float
    value: float


@dataclass(frozen=True)
class Places:
    """Positions of the axis's values: numbers above 0 by their logarithm, all others side by side."""

    at: Mapping[float | str, float]
    labels: Sequence[str]
    broken: float | None = field(default=None)  # where the axis is broken, before no privacy

    @property
    def limits(self) -> tuple[float, float]:
        low, high = min(self.at.values()), max(self.at.values())
        width = high - low or 1.0
        return low - 0.1 * width, high + 0.22 * width  # room for the number beside the last point


def places(values: Sequence[float | str], *, of_epsilon: bool) -> Places:
    """Positions of an axis's values, in their order; inf stands behind a break if they are epsilons."""
    numbers = [value for value in values if isinstance(value, float | int)]
    if len(numbers) < len(values) or (not of_epsilon and min(numbers, default=0) <= 0):
        return Places({value: float(i) for i, value in enumerate(values)}, [_tick(value) for value in values])
    finite = [math.log10(value) for value in numbers if not math.isinf(value)]
    beyond = max(finite, default=0.0) + BEYOND
    at: dict[float | str, float] = {value: beyond if math.isinf(value) else math.log10(value) for value in numbers}
    broken = beyond - BEYOND / 2 if finite and len(finite) < len(numbers) else None
    return Places(at, [_tick(value) for value in numbers], broken)


def _tick(value: float | str) -> str:
    if isinstance(value, str):
        # break at commas and blanks, so that neighbouring names do not overlap
        return value.replace(",", ",\n").replace(" ", "\n")
    return NO_PRIVACY if math.isinf(value) else f"{value:g}"


def draw_scores(
    series: Sequence[Series],
    lines: Mapping[str, float],
    xlabel: str,
    ylabel: str,
    *,
    of_epsilon: bool,
    marks: Sequence[Mark] = (),
    limits: Limits = PERCENT,
    size: tuple[float, float] = (WIDTH, HEIGHT),
) -> Figure:
    """Scores against a setting: a point per seed, their mean as a number with its 95% interval, `lines` across.

    Values are in the unit of `ylabel`, and within `limits`. A mean without an interval is a hollow point. A line
    that lies far below the scores would press them together: it is named with its value, and not drawn.
    """
    marked: list[float | str] = [mark.at for mark in marks]
    places_of: dict[float | str, None] = dict.fromkeys([*(at for one in series for at in one.values), *marked])
    order = sorted(places_of, key=float) if of_epsilon else list(places_of)
    axis = places(order, of_epsilon=of_epsilon)
    made, axes = figure(*size)
    numbers = []
    for position, one in enumerate(series):
        numbers += _draw_series(axes, one, axis, position, len(series), limits)
    for mark in marks:
        axes.plot([axis.at[mark.at]], [mark.value], marker="*", markersize=11, color=INK, linestyle="none")
        _write(axes, mark.name, (axis.at[mark.at], mark.value), (7, -12))
    drawn = [mark.value for mark in marks]
    for one in series:
        drawn += [value for values in one.values.values() for value in values]
        bounds = [bound for found in one.means(limits).values() for bound in (found.low, found.high)]
        drawn += [bound for bound in bounds if bound is not None]
    low, high = _limits(drawn, lines, percent=limits == PERCENT)
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
    axes.set_xticks(list(axis.at.values()), axis.labels, parse_math=False)
    axes.minorticks_off()
    left, right = axis.limits
    axes.set_xlim(left, right)
    _draw_lines(axes, lines, low, high, numbers)
    if axis.broken is not None:
        _break(axes, axis.broken, left, right)
    axes.set_xlabel(xlabel, parse_math=False)
    axes.set_ylabel(ylabel, parse_math=False)
    return made


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def _draw_series(
    axes: Axes, one: Series, axis: Places, position: int, count: int, limits: Limits
) -> list[tuple[float, float]]:
    """Draw one series; the places (x, y) that its means are written above, none where it has a name instead."""
    numbers = []
    colour, marker = COLOURS[position % len(COLOURS)], MARKERS[position % len(MARKERS)]
    means = one.means(limits)
    joined = [(axis.at[at], found.value) for at, found in means.items() if not (axis.broken and at == math.inf)]
    if len(joined) > 1 and not any(isinstance(at, str) for at in means):
        line = LINES[position % len(LINES)]
        axes.plot(*zip(*joined, strict=True), color=colour, linestyle=line, linewidth=1.2, alpha=0.6, gid="means")
    for at, found in means.items():
        place, top = axis.at[at], found.value
        if found.low is not None and found.high is not None:
            half = [[found.value - found.low], [found.high - found.value]]
            top = max(found.high, *one.values[at])
            axes.errorbar([place], [found.value], yerr=half, color=colour, capsize=4, linewidth=1.6, gid="interval")
            values = list(one.values[at])
            axes.scatter([place] * len(values), values, s=22, color=colour, alpha=0.55, marker=marker, zorder=3)
        else:
            axes.scatter(
                [place], [found.value], s=34, facecolors=PAPER, edgecolors=colour, linewidths=1.6, marker=marker,
                zorder=3,
            )  # fmt: skip
        if count == 1:
            _write(axes, _number(found.value), (place, top), (0, 9), "center")
            numbers.append((place, top))
    if one.name:
        last = list(means)[-1]
        _write(axes, one.name, (axis.at[last], means[last].value))
    return numbers


def _limits(drawn: Sequence[float], lines: Mapping[str, float], *, percent: bool) -> tuple[float, float]:
    """Limits of the height: all drawn values with room for numbers above, and the lines near them."""
    low, high = min(drawn), max(drawn)
    near = max(10.0 if percent else 0.0, high - low)
    beside = [value for value in lines.values() if low - near <= value <= high + near]
    low, high = min([low, *beside]), max([high + 0.1 * (high - low), *beside])
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    if percent:
        return max(0.0, 5 * math.floor((low - 1) / 5)), min(101.0, high + room)
    return (max(0.0, low - room) if low >= 0 else low - room), high + room


def _draw_lines(
    axes: Axes, lines: Mapping[str, float], low: float, high: float, numbers: Sequence[tuple[float, float]]
) -> None:
    """Draw named lines; a name stands on the left, or on the right where one of the `numbers` (x, y) is in its way."""
    below, middle, near = [], sum(axes.get_xlim()) / 2, NEAR * (high - low)
    for position, (name, value) in enumerate(lines.items()):
        shown = f"{name}: {value:.1f}"
        if not low <= value <= high:
            below.append(f"{shown} ({'below' if value < low else 'above'} the axis)")
            continue
        style = ("--", "-.", ":")[position % 3]
        axes.axhline(value, color=FAINT, linestyle=style, linewidth=1.1, label=shown, zorder=1)
        right = any(x < middle and abs(y - value) < near for x, y in numbers)
        axes.annotate(
            shown, (0.99 if right else 0.01, value), (0, 3), xycoords=axes.get_yaxis_transform(),
            textcoords="offset points", ha="right" if right else "left", fontsize=TEXT - 2, color=INK, parse_math=False,
        )  # fmt: skip
    if below:
        axes.text(
            0.99, 0.02, "\n".join(below), transform=axes.transAxes, ha="right", va="bottom", fontsize=TEXT - 2,
            color=INK, parse_math=False,
        )  # fmt: skip


def _break(axes: Axes, at: float, left: float, right: float) -> None:
    """Draw two strokes across the axis: no privacy is not a number on it."""
    share, half = (at - left) / (right - left), 0.008
    axes.plot(
        [share - half, share + half], [0, 0], transform=axes.transAxes, clip_on=False, gid="break",
        marker=[(-0.5, -1), (0.5, 1)], markersize=9, color=INK, linestyle="none", mew=1,
    )  # fmt: skip


def _write(
    axes: Axes, text: str, place: tuple[float, float], offset: tuple[float, float] = (8, 0), side: str = "left"
) -> None:
    axes.annotate(
        text, place, offset, textcoords="offset points", va="center", ha=side, fontsize=TEXT, color=INK,
        parse_math=False,
    )  # fmt: skip


def draw_epsilon(curves: Mapping[str, Sequence[tuple[float, float]]], delta: float) -> Figure:
    """Epsilon that the first steps spend together: a line per name, which stands at its end."""
    made, axes = figure()
    last = max(points[-1][0] for points in curves.values())
    for position, (name, points) in enumerate(curves.items()):
        # nothing is drawn before the first point: a line from the origin would say that epsilon grows evenly
        steps, epsilons = zip(*points, strict=True)
        line, marker = LINES[position % len(LINES)], MARKERS[position % len(MARKERS)]
        colour = COLOURS[position % len(COLOURS)]
        axes.plot(steps, epsilons, linewidth=1.8, color=colour, linestyle=line, marker=marker, markersize=4)
        _write(axes, name, (steps[-1], epsilons[-1]), (7, 0))
    axes.set_xlim(0, 1.2 * last)
    axes.set_ylim(bottom=0)
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= last])
    axes.set_xlabel("step")
    axes.set_ylabel(f"epsilon spent so far, delta {delta:g}")
    return made


# kind of epsilon -> where its words stand beside its point
SIDES = {"measured": ("center", 0, 13), "claimed": ("center", 0, -14), "bounded": ("left", 8, 0)}


def draw_bounds(named: Mapping[str, Mapping[str, float]]) -> Figure:
    """Epsilons by kind (those of SIDES) per name, which stands above them, on a logarithmic axis."""
    made, axes = figure(height=0.8 + 0.9 * len(named))
    for row, (name, epsilons) in enumerate(named.items()):
        axes.plot([min(epsilons.values()), max(epsilons.values())], [row, row], color=FAINT, linewidth=1.2, zorder=1)
        axes.annotate(
            name, (0, row), (4, 29), xycoords=axes.get_yaxis_transform(), textcoords="offset points", fontsize=TEXT - 1,
            weight="bold", color=INK, va="center", parse_math=False,
        )  # fmt: skip
        for position, (kind, (side, right, up)) in enumerate(SIDES.items()):
            if kind in epsilons:
                place = (epsilons[kind], float(row))
                axes.scatter([place[0]], [row], s=46, zorder=3, color=COLOURS[position], marker=MARKERS[position])
                _write(axes, f"{kind} {_number(place[0])}", place, (right, up), side)
    every = [epsilon for epsilons in named.values() for epsilon in epsilons.values()]
    decades = math.log10(max(every) / min(every)) or 1.0
    axes.set_xscale("log")
    # room for the words of the outermost points
    axes.set_xlim(min(every) / 10 ** (0.4 * decades), max(every) * 10 ** (0.5 * decades))
    axes.xaxis.set_major_locator(LogLocator(numticks=6))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_yticks([])
    axes.set_ylim(len(named) - 0.5, -0.75)
    axes.set_xlabel("epsilon, logarithmic")
    return made


def draw_minutes(stages: Mapping[str, Mapping[str, float]]) -> Figure:
    """Minutes per stage, one bar per name, which stands above it."""
    made, axes = figure(height=1.2 + 0.5 * len(stages))
    names = list(dict.fromkeys(stage for minutes in stages.values() for stage in minutes))
    left = [0.0] * len(stages)
    for position, stage in enumerate(names):
        widths = [minutes.get(stage, 0.0) for minutes in stages.values()]
        colour = COLOURS[position % len(COLOURS)]
        axes.barh(
            range(len(stages)),
            widths,
            left=left,
            label=stage,
            height=0.42,
            color=colour,
            edgecolor=PAPER,
            linewidth=1.0,
        )
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for row, (name, total) in enumerate(zip(stages, left, strict=True)):
        _write(axes, _number(total), (total, row), (4, 0))
        _write(axes, name, (0.0, row), (2, 13))
    axes.set_yticks([])
    axes.set_ylim(len(stages) - 0.5, -0.8)
    axes.set_xlim(0, 1.12 * max(left))
    axes.set_xlabel("minutes per run, mean over seeds")
    axes.grid(visible=False)
    made.legend(loc="outside upper left", ncols=len(names), frameon=False, labelcolor=INK, fontsize=TEXT)
    return made
