"""The report of a study: one page for people, the same page as Markdown, and its numbers as CSV."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from dp_lora.files import whole_file
from dp_lora.study.comparisons import conditions
from dp_lora.study.expenses import Expense
from dp_lora.study.published_figures import System, read_systems
from dp_lora.study.result import DONE, FAILED, RUNNING, WAITING, Study
from dp_lora.study.rows import Row, read_row
from dp_lora.study.scores import SCORES
from dp_lora.study.sections import Report, Section
from dp_lora.study.statistics import UNLIMITED, Spread, mean, spread
from dp_lora.study.tables import write_csv
from dp_lora.tracking.links import local_ui

TEMPLATE = "page.html"
PRIVATE = (
    "For the operator alone. Scores, and all that a member without privacy shows, were computed from private pictures "
    "without noise: no epsilon covers them. Where the pictures are public, as MNIST's are, nothing here is secret."
)


def write_report(study: Study, folder: Path) -> None:
    """Write report.html, report.md and a CSV of each kind of numbers into `folder`, each whole or not at all.

    The page needs no network. Only their owner can read the files: they hold scores on private pictures.
    """
    rows = [read_row(outcome) for outcome in study.outcomes]
    report = Report(study, rows, read_systems())
    sections, standing = report.sections(), _standing(study)
    _write(folder / "report.html", page(study, standing, sections))
    _write(folder / "report.md", markdown(study, standing, sections))
    write_csv(folder / "members.csv", [_member(row) for row in rows])
    write_csv(folder / "summary.csv", _summary(rows))
    write_csv(folder / "bounds.csv", [vars(one) | {"verdict": one.verdict} for one in report.bounds])
    write_csv(folder / "costs.csv", [_cost(one) for one in report.expenses])
    write_csv(folder / "published.csv", _published(report.systems))


def _write(path: Path, text: str) -> None:
    with whole_file(path, private=True) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _standing(study: Study) -> str:
    """The number of members in each state."""
    states = [outcome.state for outcome in study.outcomes]
    counts = [f"{states.count(state)} {state}" for state in (DONE, FAILED, RUNNING, WAITING) if state in states]
    return f"{len(states)} members: {', '.join(counts)}" if counts else "no members"


def _links(study: Study) -> str:
    """What links to runs need: the pages of a store that is no server are there only while `make ui` runs."""
    return f"Links lead to runs in MLflow, at {study.ui} while `make ui` runs." if study.ui == local_ui() else ""


def page(study: Study, standing: str, sections: Sequence[Section]) -> str:
    """The report as one HTML page; all text is escaped except the figures' own SVG."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.get_template(TEMPLATE)
    return template.render(study=study, standing=standing, links=_links(study), private=PRIVATE, sections=sections)


def markdown(study: Study, standing: str, sections: Sequence[Section]) -> str:
    """The report's words and tables; a plot is its title, which states the finding."""
    parts = [f"# {_line(study.title)}", f"**{PRIVATE}**", f"Study `{study.name}`, {standing}."]
    parts += [_links(study)] * bool(_links(study))
    for section in sections:
        parts += [f"## {_line(section.title)}", *section.text]
        seen = [*section.items, *(f"{plot.title}." for plot in section.plots)]
        if seen:
            parts.append("\n".join(f"- {_line(item)}" for item in seen))
        parts += [table.markdown() for table in section.tables]
        if section.grids:
            parts.append("Grids of: " + ", ".join(_line(grid.name) for grid in section.grids) + ".")
    return "\n\n".join(parts) + "\n"


def _line(text: str) -> str:
    return " ".join(text.split()).replace("<", "&lt;")


def _member(row: Row) -> dict[str, Any]:
    """A line of members.csv: the member's settings, its state, and every metric under its own name."""
    outcome = row.outcome
    return {
        "member": outcome.member.name,
        "group": outcome.member.group,
        "config": outcome.member.config,
        "seed": outcome.member.seed,
        **outcome.member.settings,
        "state": outcome.state,
        "reason": outcome.reason,
        "epsilon": row.epsilon,
        "delta": row.statement.get("delta"),
        "claimed_epsilon": row.statement.get("claimed_epsilon"),
        "bounded_epsilon": row.statement.get("bounded_epsilon"),
        **row.metrics,
        **{f"seconds_{stage}": seconds for stage, seconds in outcome.seconds.items()},
        "seconds": row.seconds,
        "peak_memory_gib": outcome.peak_memory,
        "gpu_hours": row.gpu_hours,
        "device": outcome.device,
        **{f"run_{stage}": run for stage, run in outcome.runs.items()},
    }


def _cost(one: Expense) -> dict[str, Any]:
    """A line of costs.csv: a run of one condition."""
    return {
        "condition": one.condition,
        "runs": one.runs,
        "minutes": one.minutes.value,
        "minutes_low": one.minutes.low,
        "minutes_high": one.minutes.high,
        **{f"minutes_{stage}": minutes for stage, minutes in one.stages.items()},
        "peak_memory_gib": one.peak_memory,
        "gpu_hours": one.gpu_hours,
        "devices": ", ".join(one.devices),
    }


def _published(systems: Sequence[System]) -> list[dict[str, Any]]:
    """Lines of published.csv: each figure of another system, or one line for a system that published none."""
    return [
        {"system": system.name, "source": system.source, "note": system.note, **figure}
        for system in systems
        for figure in [vars(one) | {"configs": " ".join(one.configs)} for one in system.figures] or [{}]
    ]


def _summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Lines of summary.csv: mean and 95% interval of every metric in every condition."""
    lines = []
    limits = {score.metric: score.limits for score in SCORES}
    every = conditions(rows)

    @functools.cache
    def pool(metric: str) -> Spread:
        return spread(one.values(metric) for one in every)

    for one in every:
        epsilons = [row.epsilon for row in one.rows if row.epsilon is not None]
        for metric in dict.fromkeys(name for row in one.rows for name in row.metrics):
            if metric.endswith(("_low", "_high")):
                continue
            found = mean(one.values(metric), limits.get(metric, UNLIMITED), pool(metric))
            lines.append(
                {
                    "condition": one.label,
                    "config": one.rows[0].outcome.member.config,
                    "epsilon": max(epsilons, default=math.nan),
                    "metric": metric,
                    "mean": found.value,
                    "low": found.low,
                    "high": found.high,
                    "seeds": found.n,
                }
            )
    return lines
