"""Files and text of an audit: its numbers, a table that explains each of them, and a picture."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dp_lora.files import whole_file
from dp_lora.privacy.audit import Audit
from dp_lora.privacy.audit_scores import JUMPS, Measured
from dp_lora.training.audit import Audited

BINS = 50
DIRECT = {
    "noise": "spread of the noise over the stated one; 1, or more",
    "lag": "correlation of the noise of successive steps; 0",
    "jump": "rate times jump of a unit over the accounted one; at most 1",
    "divisor": "spread of the mean gradient without one more unit over that with it; 1",
}
IN, OUT, CLAIM = "#d1495b", "#30638e", "#222222"


def metrics(audit: Audit) -> dict[str, float]:
    """All numbers by name; intervals as NAME_low and NAME_high."""
    found = {
        "audit_epsilon_bound": audit.bound.epsilon,
        "audit_epsilon_ceiling": audit.ceiling,
        "audit_epsilon_claimed": audit.claimed,
        "audit_divisor_bound": audit.worlds_bound,
        "audit_divisor_claimed": audit.worlds_claimed,
        "audit_refuted": float(audit.refuted),
    }
    for name in DIRECT:
        measured: Measured = getattr(audit, name)
        found[f"audit_{name}"] = measured.value
        found[f"audit_{name}_low"] = measured.value - measured.half
        found[f"audit_{name}_high"] = measured.value + measured.half
    return found


def table(audit: Audit) -> dict[str, list[Any]]:
    """The audit as columns, a row per number."""
    nothing = float("nan")
    rows = [
        ("epsilon bound", audit.bound.epsilon, nothing, nothing, "epsilon is at least this, at 95% confidence"),
        ("epsilon ceiling", audit.ceiling, nothing, nothing, "what perfect guesses would give: never more is shown"),
        ("epsilon claimed", audit.claimed, nothing, nothing, f"of the plan at delta {audit.delta:g}"),
        ("divisor bound", audit.worlds_bound, nothing, nothing, "epsilon of the divisor alone is at least this"),
    ]
    for name, meaning in DIRECT.items():
        measured: Measured = getattr(audit, name)
        rows.append((name, measured.value, measured.value - measured.half, measured.value + measured.half, meaning))
    columns = zip(*rows, strict=True)
    return dict(zip(("number", "value", "low", "high", "meaning"), map(list, columns), strict=True))


def text(audit: Audit) -> str:
    """The table for a terminal, and the verdict."""
    rows = zip(*table(audit).values(), strict=True)
    lines = []
    for name, value, low, high, meaning in rows:
        interval = "" if np.isnan(low) else f"({low:.3f} to {high:.3f})"
        lines.append(f"{name:<16} {value:>8.3f}  {interval:<18} {meaning}")
    return "\n".join([*lines, audit.verdict])


def write_picture(path: Path, audited: Audited, title: str) -> None:
    """A picture: scores of canaries that were in and out; bound, ceiling and claim; the direct numbers."""
    audit = audited.audit
    figure = Figure(figsize=(11, 4.2), dpi=110, layout="constrained")
    figure.suptitle(f"{title}: {audit.verdict.partition(':')[0]}")
    scores, bars, direct = figure.subplots(1, 3, width_ratios=(1.5, 1, 1.2))
    _scores(scores, audited)
    _bars(bars, audit)
    _direct(direct, audit)
    with whole_file(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


def _scores(axes: Axes, audited: Audited) -> None:
    name = audited.audit.bound.score or f"jump {JUMPS[0]}"
    score = audited.scores[name]
    low, high = np.quantile(score, (0.002, 0.998))
    bins = np.linspace(low, high if high > low else low + 1, BINS).tolist()
    for inside, label, colour in ((~audited.coins, "out", OUT), (audited.coins, "in", IN)):
        axes.hist(np.clip(score[inside], low, high), bins=bins, alpha=0.6, label=label, color=colour)
    axes.set_title(f"canaries by score '{name}'")
    axes.set_xlabel("score: high where a canary seems to be in")
    axes.set_ylabel("canaries")
    axes.legend()


def _bars(axes: Axes, audit: Audit) -> None:
    over = audit.bound.epsilon > audit.claimed
    axes.bar(["bound"], [audit.bound.epsilon], color=IN if over else OUT)
    axes.bar(["ceiling"], [audit.ceiling], color="#cccccc")
    axes.axhline(audit.claimed, color=CLAIM, linestyle="--", label=f"claimed {audit.claimed:.3g}")
    for place, value in enumerate((audit.bound.epsilon, audit.ceiling)):
        axes.text(place, value, f"{value:.2f}", ha="center", va="bottom")
    axes.set_ylim(0, 1.25 * max(audit.ceiling, audit.bound.epsilon, audit.claimed))
    axes.set_ylabel(f"epsilon at delta {audit.delta:g}")
    axes.set_title("what is refuted (95%)")
    axes.legend(loc="upper left")


def _direct(axes: Axes, audit: Audit) -> None:
    names = list(DIRECT)[::-1]
    measured: list[Measured] = [getattr(audit, name) for name in names]
    for place, one in enumerate(measured):
        odd = one.is_above() or one.is_below()
        axes.errorbar(one.value, place, xerr=one.half, fmt="o", color=IN if odd else OUT, capsize=4)
        axes.plot([one.right], [place], marker="|", markersize=22, color=CLAIM)
        axes.text(one.value, place + 0.18, f"{one.value:.3f}", ha="center", va="bottom", fontsize=9)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.5, len(names) - 0.3)
    low, high = min(one.value for one in measured), max(one.value for one in measured)
    margin = max(0.5, 0.12 * (high - low))  # room for the numbers
    axes.set_xlim(min(0.0, low) - margin, max(1.0, high) + margin)
    axes.set_title("direct numbers (| : a right step)")
