"""The sections of a report: words, plots, tables and grids, each made of a study's rows."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dp_lora.study.bounds import WORDS, Bounds, bounds_of
from dp_lora.study.comparisons import EPSILON, Comparison, Condition, comparisons, conditions
from dp_lora.study.drawing import svg
from dp_lora.study.expenses import Expense, expenses_of
from dp_lora.study.findings import Finding, beside_lines, cost_of_privacy, finding, scores_of
from dp_lora.study.grids import SampleGrid, grids_of
from dp_lora.study.plots import Mark, Series, draw_bounds, draw_epsilon, draw_minutes, draw_scores
from dp_lora.study.published_figures import System
from dp_lora.study.result import AUDIT, DONE, Study
from dp_lora.study.rows import Row
from dp_lora.study.scores import ACCURACY, PRECISION, RECALL, SCORES, Score
from dp_lora.study.statistics import Mean, mean
from dp_lora.study.tables import Cell, Table, table
from dp_lora.tracking.links import run_page

INTERVALS = (
    "Intervals are of 95%, by Student's t: the wider of the one by a condition's own seeds and the one by the standard "
    "deviation over seeds of all conditions together. * and a hollow point: no interval, from one seed or equal ones."
)
LINES = (
    "Accuracy is of a classifier that saw the samples alone. Lines: classifiers of the real training pictures, of "
    "public pictures, and of samples that the base draws before fine-tuning."
)
NOT_YET = "-"
DRAWN_SCORES = 3  # of a comparison that is not of epsilon


@dataclass(frozen=True)
class Plot:
    """A figure: its title states the finding, `links` lead to its runs."""

    title: str
    svg: str
    links: Sequence[Cell] = ()


@dataclass(frozen=True)
class Section:
    """A part of the report, with a heading."""

    title: str
    text: Sequence[str] = ()
    items: Sequence[str] = ()
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()
    grids: Sequence[SampleGrid] = ()


@dataclass
class Report:
    """What a study's sections are made of."""

    study: Study
    rows: Sequence[Row]
    systems: Sequence[System]

    @functools.cached_property
    def comparisons(self) -> list[Comparison]:
        return comparisons(self.rows)

    @functools.cached_property
    def bounds(self) -> list[Bounds]:
        return bounds_of(self.rows, self.study.audits)

    @functools.cached_property
    def expenses(self) -> list[Expense]:
        return expenses_of(conditions(self.rows))

    @property
    def scored(self) -> list[Condition]:
        return [one for one in conditions(self.rows) if one.scored]

    def sections(self) -> list[Section]:
        """All sections that are not empty, in the report's order."""
        found = [self._spent(), self._findings(), self._open(), *map(self._compared, self.comparisons)]
        found += [self._grids(), self._epsilon(), self._bounds(), self._costs(), self._others(), self._members()]
        return [section for section in found if section is not None]

    def links(self, rows: Sequence[Row]) -> list[Cell]:
        """Links to the run of each row that made its scores, or to the last run before."""
        found = [(row.outcome.member.name, self._last_run(row)) for row in rows]
        return [Cell(name, link) for name, link in found if link]

    def _link(self, run_id: str) -> str:
        address, experiment = self.study.ui, self.study.experiment_id
        # a page must not link to an address of another kind, such as a file's
        if not run_id or not experiment or not address.startswith(("http://", "https://")):
            return ""
        return run_page(address, experiment, run_id)

    def _audits(self) -> list[Cell]:
        """Links to the runs of audits, each named by its member."""
        found = [(row.outcome.member.name, *made) for row in self.rows for made in row.outcome.runs.items()]
        links = [(f"{name}: {stage}", self._link(run)) for name, stage, run in found if stage.startswith(AUDIT)]
        return [Cell(name, link) for name, link in links if link]

    def _last_run(self, row: Row) -> str:
        return self._link(
            next((row.outcome.runs[s] for s in ("fid", "sample", "finetune") if s in row.outcome.runs), "")
        )

    def _spent(self) -> Section:
        study = self.study
        if study.epsilon_of_all is None or study.delta_of_all is None:
            cost = (
                "Publishing all members has no bound: none of them has a guarantee (eps inf, or the released "
                "accounting), and none is ever to be published."
            )
        else:
            cost = (
                f"Publishing all private releases together costs epsilon {study.epsilon_of_all:.4g} at delta "
                f"{study.delta_of_all:.3g}: they read the same private pictures, so they compose. A member without a "
                "guarantee (eps inf, the released accounting) is not counted, and is never to be published."
            )
        why = (
            "A study on private data is spending: each member saw the same pictures, and each epsilon below holds for "
            "one release alone. Choosing the best of them by its scores reads private pictures once more."
        )
        return Section("What publishing would cost", [cost, why])

    def _findings(self) -> Section | None:
        found: list[Finding | None] = []
        for comparison in self.comparisons:
            scores = scores_of(comparison.conditions)
            if comparison.of_epsilon:
                for score in scores[:DRAWN_SCORES]:
                    found += [finding(comparison, score), cost_of_privacy(comparison, score)]
                found += beside_lines(comparison, scores[0]) if scores else []
            else:
                found += [finding(comparison, score) for score in scores[:1]]
        # a reader who stops after three lines has read the sure ones
        sure = sorted(dict.fromkeys(one for one in found if one is not None), key=lambda one: not one.sure)
        items = [f"{one.text}." for one in sure]
        return Section("What is seen", items=items) if items else None

    def _open(self) -> Section | None:
        rows = [row for row in self.rows if row.outcome.state != DONE or row.lacks]
        if not rows:
            return None
        lines: list[list[str | Cell]] = []
        for row in rows:
            outcome = row.outcome
            reason = outcome.reason or (f"left no {', no '.join(row.lacks)}" if row.lacks else NOT_YET)
            state = outcome.state if outcome.state != DONE else "done, but"
            lines.append([Cell(outcome.member.name, self._last_run(row)), state, reason])
        text = "These members are in no mean, plot or finding." if all(not r.metrics for r in rows) else ""
        return Section("Members that failed, wait or lack something", [text] * bool(text),
                       tables=[table(["member", "state", "why"], lines)])  # fmt: skip

    def _compared(self, comparison: Comparison) -> Section | None:
        scored = [one for one in comparison.conditions if one.scored]
        title = f"By {comparison.name}"
        scores = scores_of(scored)
        if len(scored) < 2 or not scores:
            return Section(title, ["Fewer than two of its conditions have scores: there is nothing to compare yet."])
        drawn = scores if comparison.of_epsilon else scores[:DRAWN_SCORES]
        both = [PRECISION, RECALL]
        plots = [self._plot(comparison, [score]) for score in drawn if score not in both]
        if comparison.of_epsilon and all(score in drawn for score in both):
            plots.append(self._plot(comparison, both))
        header = [comparison.name, "seeds", "epsilon spent", *(score.short for score in scores)]
        lines: list[list[str | Cell]] = [
            [comparison.shown(one), *_facts(comparison, one, scores)] for one in comparison.conditions
        ]
        missing = [score.short for score in SCORES[:2] if score not in scores] if comparison.of_epsilon else []
        text = [INTERVALS, *([f"Not measured here: {', '.join(missing)}."] if missing else [])]
        if ACCURACY in scores and comparison.of_epsilon:
            text.append(LINES)
        return Section(title, text, plots=plots, tables=[table(header, lines)])

    def _plot(self, comparison: Comparison, scores: Sequence[Score]) -> Plot:
        scored = [one for one in comparison.conditions if any(one.values(score.metric) for score in scores)]
        series = [
            Series(
                {comparison.value(one): [score.scale * value for value in one.values(score.metric)] for one in scored},
                score.short.removesuffix(", %") if len(scores) > 1 else "",
                comparison.spread(score.metric).times(score.scale),
            )
            for score in scores
        ]
        score = scores[0]
        lines = {} if len(scores) > 1 else _references(score, scored)
        ylabel = score.axis if len(scores) == 1 else "share, %"
        limits = (score.scale * score.limits[0], score.scale * score.limits[1])
        figure = draw_scores(
            series, lines, self._xlabel(comparison), ylabel, of_epsilon=comparison.of_epsilon,
            marks=self._marks(comparison, scores), limits=limits,
        )  # fmt: skip
        said = [one.text for one in (finding(comparison, score) for score in scores) if one is not None]
        seen = " · ".join(said) or f"{score.name}"
        name = f"{comparison.title}-{'-'.join(one.metric for one in scores)}"
        return Plot(seen, svg(figure, name, seen), self.links([row for one in scored for row in one.scored]))

    def _xlabel(self, comparison: Comparison) -> str:
        if not comparison.of_epsilon:
            return comparison.name
        deltas = {one.rows[0].settings["privacy.delta"] for one in comparison.conditions}
        return f"target epsilon of one run, delta {', '.join(f'{delta:g}' for delta in sorted(deltas))}"

    def _marks(self, comparison: Comparison, scores: Sequence[Score]) -> list[Mark]:
        if not comparison.of_epsilon or len(scores) > 1:
            return []
        configs = {row.outcome.member.config for one in comparison.conditions for row in one.rows}
        return [
            Mark(system.name, figure.epsilon, scores[0].scale * figure.value)
            for system in self.systems
            for figure in system.of(configs)
            if figure.metric == scores[0].metric
        ]

    def _grids(self) -> Section | None:
        chosen = [one for one in self.comparisons if one.of_epsilon] or list(self.comparisons[:1])
        grids = [grid for comparison in chosen for grid in grids_of(comparison, self._last_run)]
        if not grids:
            return None
        seeds = sorted({grid.seed for grid in grids})
        text = (
            f"The first samples of each class or prompt, not the best ones; seed {', '.join(map(str, seeds))} "
            "everywhere: each place shows the same noise under another adapter."
        )
        return Section("Samples side by side", [text], grids=grids)

    def _epsilon(self) -> Section | None:
        """Epsilon over the steps of each plan; equal curves are drawn once."""
        curves: dict[tuple[tuple[float, float], ...], Row] = {}
        for row in self.rows:
            if row.curve:
                curves.setdefault(row.curve, row)
        rows = sorted(curves.values(), key=lambda row: -row.curve[-1][1])
        if not rows:
            return None
        named: dict[str, tuple[tuple[float, float], ...]] = {}
        for row in rows:
            eps = f"eps {row.settings[EPSILON]:g}" if row.settings else row.label
            named.setdefault(eps if eps not in named else row.label, row.curve)
        points = rows[0].curve
        half = next(step for step, epsilon in points if epsilon >= points[-1][1] / 2)
        seen = (
            f"Half of epsilon {points[-1][1]:.3g} is spent by step {half:g} of {points[-1][0]:g}"
            f" ({100 * half / points[-1][0]:.0f}% of the steps)"
        )
        figure = draw_epsilon(named, float(rows[0].statement.get("delta", math.nan)))
        return Section("Epsilon over steps", plots=[Plot(seen, svg(figure, "epsilon", seen), self.links(rows))])

    def _bounds(self) -> Section | None:
        found = self.bounds
        if not found:
            return None
        header = ["accounting", "k", "delta", "claimed", "bounded", "measured, at least", "audit's ceiling", "verdict"]
        lines = [
            [
                WORDS[one.accounting],
                NOT_YET if one.k is None else str(one.k),
                f"{one.delta:g}",
                *map(_bound, (one.claimed, one.bounded, one.measured, one.ceiling)),
                one.verdict,
            ]
            for one in found
        ]
        drawn = {f"{one.name}, claims {_bound(one.claimed)}": one.epsilons for one in found}
        worst = max(found, key=lambda one: (one.bounded or 0.0) / one.claimed)
        text = [
            "Claimed: what is printed. Bounded: what the noise that is there allows one unit to show. Measured: what "
            "an audit proves with 95% confidence; below the claim it proves nothing. Draws clipped apart: as in the "
            "released code, where each of the k draws is clipped alone and the noise is set for one of them. An "
            "audit at a small epsilon tests the same step at larger ones, where no audit can refute."
        ]
        seen = "No claim lies below what the noise bounds"
        if worst.short:
            seen = (
                f"With draws clipped apart, k {worst.k} claims epsilon {_bound(worst.claimed)}, and its noise bounds "
                f"{_bound(worst.bounded)}"
            )
        private = [row for row in self.rows if row.settings and not math.isinf(row.settings[EPSILON])]
        plots = [Plot(seen, svg(draw_bounds(drawn), "bounds", seen), [*self._audits(), *self.links(private)])]
        return Section("Is epsilon true", text, plots=plots, tables=[table(header, lines)])

    def _costs(self) -> Section | None:
        if not self.expenses:
            return None
        lines: list[list[str | Cell]] = [
            [
                one.condition,
                str(one.runs),
                _interval(one.minutes, "{:.1f}".format),
                NOT_YET if one.peak_memory is None else f"{one.peak_memory:.2f}",
                f"{one.gpu_hours:.2f}" if one.gpu_hours else "0: no GPU",
                ", ".join(one.devices) or NOT_YET,
            ]
            for one in self.expenses
        ]
        every = [row for row in self.rows if row.outcome.seconds]
        minutes = {one.condition: one.stages for one in self.expenses}
        longest = max(minutes, key=lambda label: sum(minutes[label].values()))
        all_hours = math.fsum(row.seconds or 0.0 for row in every) / 3600
        gpu_hours = math.fsum(row.gpu_hours or 0.0 for row in every)
        seen = (
            f"All {len(every)} runs together took {all_hours:.2f} hours"
            + (f" and {gpu_hours:.2f} GPU hours" if gpu_hours else "")
            + f"; a run of {longest} is the longest, {sum(minutes[longest].values()):.1f} minutes"
        )
        header = ["condition", "runs", "minutes per run", "peak memory, GiB", "GPU hours per run", "on"]
        plot = Plot(seen, svg(draw_minutes(minutes), "minutes", seen), self.links(every))
        return Section("Time and memory", plots=[plot], tables=[table(header, lines)])

    def _others(self) -> Section | None:
        """What other systems published."""
        if not self.systems:
            return None
        header = ["system", "metric", "value", "epsilon", "delta", "experiments", "where"]
        lines: list[list[str | Cell]] = []
        for system in self.systems:
            name = Cell(system.name, system.source)
            for one in system.figures:
                delta = NOT_YET if one.delta is None else f"{one.delta:g}"
                line = [one.metric, f"{one.value:g}", f"{one.epsilon:g}", delta, ", ".join(one.configs), one.stated]
                lines.append([name, *line])
            if not system.figures:
                lines.append([name, "none published", *[NOT_YET] * 5])
        items = [f"{system.name}: {system.note}." for system in self.systems if system.note]
        return Section("Published figures of other systems", items=items, tables=[table(header, lines)])

    def _members(self) -> Section:
        scores = scores_of(self.scored)
        header = ["member", "state", "epsilon", "delta", *(score.short for score in scores), "minutes"]
        lines: list[list[str | Cell]] = []
        for row in self.rows:
            values = (row.metrics.get(score.metric) for score in scores)
            shown = [NOT_YET if v is None else s.shown(v) for s, v in zip(scores, values, strict=True)]
            delta = row.statement.get("delta")
            lines.append(
                [
                    Cell(row.outcome.member.name, self._last_run(row)),
                    row.outcome.state,
                    row.spent or NOT_YET,
                    NOT_YET if delta is None else f"{delta:g}",
                    *shown,
                    NOT_YET if row.seconds is None else f"{row.seconds / 60:.1f}",
                ]
            )
        return Section("All members", tables=[table(header, lines)])


def _facts(comparison: Comparison, one: Condition, scores: Sequence[Score]) -> list[Cell]:
    """Cells of a condition: seeds, epsilon, and a mean per score."""
    epsilons = {row.spent for row in one.rows if row.spent}
    cells = [Cell(str(len(one.scored))), Cell(", ".join(sorted(epsilons)) or NOT_YET)]
    for score in scores:
        values = one.values(score.metric)
        pool = comparison.spread(score.metric)
        cells.append(_interval(mean(values, score.limits, pool), score.shown) if values else Cell(NOT_YET))
    return cells


def _interval(found: Mean, write: Callable[[float], str]) -> Cell:
    value, interval = found.shown(write)
    return Cell(value, detail=interval)


def _references(score: Score, some: Sequence[Condition]) -> dict[str, float]:
    """What each reference line says -> its height: the mean over all members that were scored beside it."""
    found = {}
    for metric, said in score.references.items():
        values = [value for one in some for value in one.values(metric)]
        if values:
            found[said] = score.scale * mean(values).value
    return found


def _bound(epsilon: float | None) -> str:
    if epsilon is None:
        return NOT_YET
    return f"{epsilon:,.0f}" if 100 <= epsilon < math.inf else f"{epsilon:.3g}"
