"""The report of a study with made-up outcomes has the right numbers and words, and is one page that loads nothing."""

import csv
import dataclasses
import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from scipy import stats

from dp_lora.config import config_names
from dp_lora.errors import InputError
from dp_lora.files import read_json, write_json
from dp_lora.privacy.accounting import spent
from dp_lora.study.bounds import bounds_of
from dp_lora.study.comparisons import comparisons
from dp_lora.study.plots import Mark, Series, draw_scores
from dp_lora.study.published_figures import read_systems
from dp_lora.study.report import write_report
from dp_lora.study.result import DONE, RUNNING, Member, Outcome, Study
from dp_lora.study.rows import read_row
from dp_lora.study.scores import SCORES
from dp_lora.study.statistics import Mean, difference, mean, spread
from dp_lora.tracking.links import local_ui, ui_address
from dp_lora.training.plan import make_plan
from tests.support.studies import FEW_STEPS, REASON, audit_lines, configured, digits_study, done, member

SEEDS = 2


class Page(HTMLParser):
    """The files that a page loads, its links, its tables as rows of words, and all its text."""

    def __init__(self, text):
        super().__init__()
        self.loaded, self.links, self.rows, self.words, self.tags = [], [], [], [], []
        self.style = self.cell = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        self.style = tag == "style"
        self.loaded += [given[name] for name in ("src", "srcset", "data", "poster") if name in given]
        if tag in ("link", "base", "image", "use", "script") and "href" in given:
            self.loaded.append(given["href"])
        self.loaded += [value for name, value in attrs if name == "xlink:href"]
        if tag == "a":
            self.links.append(given["href"])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.style = self.style and tag != "style"
        if tag in ("td", "th"):
            self.cell = False
            self.rows[-1][-1] = " ".join(self.rows[-1][-1].split())

    def handle_data(self, data):
        if not self.style:
            self.words.append(data)
        if self.cell:
            self.rows[-1][-1] += f" {data}"

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return digits_study(tmp_path_factory.mktemp("study"), seeds=SEEDS)


@pytest.fixture(scope="module")
def folder(study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(study, folder)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def accuracies(study, eps, **others):
    wanted = {**FEW_STEPS, "privacy.eps": eps, **others}
    found = [one for one in study.outcomes if one.state == DONE and dict(one.member.settings) == wanted]
    return [read_json(one.folder / "evaluation" / "metrics.json")["accuracy"] for one in found]


def lines_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def pooled(*groups):
    """The standard deviation pooled over groups of equal size, and Student's quantile for a 95% interval."""
    freedom = sum(len(group) - 1 for group in groups)
    return math.sqrt(np.mean([np.var(group, ddof=1) for group in groups])), stats.t.ppf(0.975, freedom)


def half_of_mean(own, *groups):
    """Half the wider 95% interval of the mean of `own`: by its own seeds, or by the deviation pooled over `groups`."""
    deviation, quantile = pooled(*groups)
    alone = stats.ttest_1samp(own, 0).confidence_interval(0.95)
    return max(quantile * deviation / math.sqrt(len(own)), (alone.high - alone.low) / 2)


def half_of_difference(first, second, *groups):
    """Half the wider 95% interval of a difference of means: Welch's, or by the deviation pooled over `groups`."""
    deviation, quantile = pooled(*groups)
    welch = stats.ttest_ind(second, first, equal_var=False).confidence_interval(0.95)
    return max(quantile * deviation * math.sqrt(2 / len(first)), (welch.high - welch.low) / 2)


def test_a_table_has_the_mean_and_the_wider_interval_over_seeds_and_a_mark_where_there_is_one_seed(study, page, folder):
    values = np.array(accuracies(study, "1"))
    half = half_of_mean(values, *(accuracies(study, eps) for eps in ("1", "10", "inf")))
    low, centre, high = 100 * (values.mean() - half), 100 * values.mean(), 100 * (values.mean() + half)
    (row,) = (row for row in page.rows if row[0] == "eps 1")
    assert row[1] == str(SEEDS)
    assert row[3] == f"{centre:.1f} {low:.1f} to {high:.1f}"
    (single,) = accuracies(study, "10", **{"privacy.k": "4"})
    (row,) = (row for row in page.rows if row[0] == "k 4")
    assert (row[1], row[3]) == ("1", f"{100 * single:.1f} *")
    assert f"| {centre:.1f} ({low:.1f} to {high:.1f}) |" in (folder / "report.md").read_text(encoding="utf-8")
    (line,) = (
        line
        for line in lines_of(folder / "summary.csv")
        if line["condition"] == "eps=1" and line["metric"] == "accuracy"
    )
    found = [float(line[name]) for name in ("mean", "low", "high", "seeds")]
    assert found == pytest.approx([values.mean(), values.mean() - half, values.mean() + half, SEEDS])


def test_members_csv_has_every_metric_and_cost_of_every_member_and_is_its_owner_s_alone(study, folder):
    lines = lines_of(folder / "members.csv")
    assert [line["member"] for line in lines] == [one.member.name for one in study.outcomes]
    first = read_json(study.outcomes[0].folder / "evaluation" / "metrics.json")
    assert {name: float(lines[0][name]) for name in first} == pytest.approx(first)
    assert float(lines[0]["seconds"]) == 150.5
    assert (lines[0]["peak_memory_gib"], lines[0]["gpu_hours"]) == ("1.9", "0.0")
    assert lines[-2]["reason"] == REASON
    assert lines[-2]["accuracy"] == ""
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600


def test_costs_and_published_figures_have_a_csv_with_the_numbers_of_their_tables(study, page, folder):
    lines = {line["condition"]: line for line in lines_of(folder / "costs.csv")}
    (row,) = [row for row in page.rows if row[0] == "eps=1" and len(row) == 6]
    one = lines["eps=1"]
    assert (f"{float(one['minutes']):.1f}", one["runs"], one["devices"]) == (row[2].split()[0], row[1], row[5])
    assert float(one["minutes_low"]) < float(one["minutes"]) < float(one["minutes_high"])
    assert float(one["minutes_fid"]) == pytest.approx(24.5 / 60)
    assert [line["system"] for line in lines_of(folder / "published.csv")] == [
        system.name for system in read_systems() for _ in system.figures or [None]
    ]


def test_the_page_loads_nothing_and_has_no_script(page):
    assert page.loaded
    assert {one[:1] if one.startswith("#") else one.partition(",")[0] for one in page.loaded} == {
        "#",
        "data:image/png;base64",
    }
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)


def test_figures_and_members_lead_to_their_runs(study, page):
    run = study.outcomes[0].runs["fid"]
    assert any(link.startswith(f"http://127.0.0.1:5000/#/experiments/7/runs/{run}?") for link in page.links)
    assert any("/runs/" + "f" * 32 in link for link in page.links)


@pytest.mark.parametrize(
    ("store", "address"),
    [
        ("sqlite:////somewhere/mlflow.db", "http://127.0.0.1:5000"),
        ("postgresql://me:secret@example.org/runs", "http://127.0.0.1:5000"),
        ("https://me:secret@example.org/mlflow/", "https://example.org/mlflow"),
    ],
)
def test_links_lead_to_the_server_of_the_store_or_to_make_ui_and_the_page_says_so(
    store, address, study, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    assert ui_address() == address
    one = dataclasses.replace(study, outcomes=study.outcomes[-1:], audits=(), ui=ui_address())
    run = dataclasses.replace(one.outcomes[0], runs={"fid": "e" * 32})
    write_report(dataclasses.replace(one, outcomes=(run,)), tmp_path)
    found = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert [link for link in found.links if link.startswith(f"{address}/#/experiments/7/runs/{'e' * 32}?")]
    for text in (found.text, (tmp_path / "report.md").read_text(encoding="utf-8")):
        assert ("while `make ui` runs" in text) == (address == local_ui())


def test_a_member_that_failed_and_one_that_waits_stand_there_with_their_lines(page):
    rows = [row for row in page.rows if row[1:2] in (["failed"], ["waiting"]) and len(row) == 3]
    assert rows == [["eps=10 k=8 seed=0", "failed", REASON], ["eps=10 k=12 seed=0", "waiting", "-"]]


def test_html_in_titles_names_and_reasons_is_text(page, folder, tmp_path):
    assert "Epsilon, k, rank & targets on <MNIST>" in page.text
    assert "mnist" not in page.tags
    hostile = Member("<script>alert(1)</script> $x_1$", "mnist5k", {"privacy.eps": "nonsense"}, 0, "<b>|group</b>")
    one = Outcome(hostile, RUNNING, tmp_path, "<img src=http://example.org/x.png>")
    write_report(Study("<i>", "<i>", (one,), None, None, ui="javascript:alert(1)"), tmp_path / "report")
    found = Page((tmp_path / "report" / "report.html").read_text(encoding="utf-8"))
    assert not {"script", "img", "b", "i"} & set(found.tags)
    assert found.loaded == []
    assert not [link for link in found.links if link.startswith("javascript")]
    assert "<img src=http://example.org/x.png>" in found.text
    markdown = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "<script>" not in markdown


def test_it_says_what_publishing_all_members_costs(study, page, tmp_path):
    assert "Publishing all members has no bound" in page.text
    assert "A study on private data is spending" in page.text
    one = dataclasses.replace(study, outcomes=study.outcomes[:1], epsilon_of_all=12.5, delta_of_all=3e-5)
    write_report(one, tmp_path)
    assert "costs epsilon 12.5 at delta 3e-05" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_titles_are_computed_and_name_their_uncertainty(study, page):
    low, high = accuracies(study, "1"), accuracies(study, "10")
    change = 100 * (np.mean(high) - np.mean(low))
    half = 100 * half_of_difference(low, high, low, high, accuracies(study, "inf"))
    assert f"95% interval {change - half:.1f} to {change + half:.1f}" in page.text
    (single,) = accuracies(study, "10", **{"privacy.k": "4"})
    down = 100 * (single - np.mean(high))
    assert f"Accuracy goes {'up' if down > 0 else 'down'} by {abs(down):.1f} points, from" in page.text
    sure = abs(change) > half
    assert (f"Accuracy rises by {change:.1f} points" in page.text) == sure


def test_accuracy_at_the_smallest_epsilon_is_compared_with_each_line_run_by_run(study, page):
    rows = [row for row in map(read_row, study.outcomes) if row.outcome.member.group == "epsilon"]
    for metric, side, said in (
        ("accuracy_public_only", 1, 'above "trained on public pictures"'),
        ("accuracy_train_on_real", -1, 'below "trained on real pictures"'),
    ):
        gains = np.array([100 * side * (row.metrics["accuracy"] - row.metrics[metric]) for row in rows])
        centre, half = gains[:SEEDS].mean(), half_of_mean(gains[:SEEDS], *gains.reshape(3, SEEDS))
        size, interval = f"{centre:.1f} points", f"95% interval {centre - half:.1f} to {centre + half:.1f}"
        assert f"Accuracy at eps 1 is {size} {said} ({interval})" in page.text


def test_sure_findings_stand_before_those_that_may_be_none(folder):
    text = (folder / "report.md").read_text(encoding="utf-8").split("## What is seen")[1].split("\n## ")[0]
    items = [line for line in text.splitlines() if line.startswith("- ")]
    unsure = ["no sure difference" in item or "one seed, so no interval" in item for item in items]
    assert unsure == sorted(unsure)
    assert {True, False} == set(unsure)


def test_a_line_s_name_gives_way_to_a_number_beside_it():
    series = Series({1.0: [90, 92], 10.0: [70, 71]})
    figure = draw_scores([series], {"high": 98.0, "low": 60.0}, "eps", "%", of_epsilon=True)
    at = {text.get_text().split(":")[0]: text.xy[0] for text in figure.axes[0].texts if ":" in text.get_text()}
    assert at["low"] == 0.01
    # the mean at eps 1 stands above its interval's end, near the line
    assert mean([90, 92], (0.0, 100.0)).high > 98
    assert at["high"] == 0.99


SOME, OTHERS, EQUAL = [0.867, 0.842, 0.883], [0.924, 0.934], [0.926] * 3


def test_a_mean_and_a_difference_that_are_alone_have_scipy_s_intervals_by_their_own_seeds():
    found = stats.ttest_1samp(SOME, 0).confidence_interval(0.95)
    assert (mean(SOME).low, mean(SOME).high) == pytest.approx((found.low, found.high))
    found = stats.ttest_ind(OTHERS, SOME, equal_var=False).confidence_interval(0.95)
    assert (difference(SOME, OTHERS).low, difference(SOME, OTHERS).high) == pytest.approx((found.low, found.high))
    # even with few seeds no share is below 0 or above 1
    assert (mean([0.1, 0.9], (0.0, 1.0)).low, mean([0.1, 0.9], (0.0, 1.0)).high) == (0.0, 1.0)
    assert mean(SOME, (0.0, 1.0)) == mean(SOME)


def test_seeds_that_are_all_equal_have_the_width_of_the_other_conditions_seeds():
    pool = spread([SOME, OTHERS, EQUAL, [0.5]])
    within = [value - np.mean(group) for group in (SOME, OTHERS, EQUAL) for value in group]
    assert pool.deviation == pytest.approx(math.sqrt(np.square(within).sum() / 5))  # 8 values less 3 means
    assert pool.freedom == 5
    quantile = stats.t(5).ppf(0.975)
    found = mean(EQUAL, pool=pool)
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 5, 0.926, pool.deviation / math.sqrt(3)))
    found = difference(EQUAL, [0.929] * 2, pool)
    half = quantile * pool.deviation * math.sqrt(1 / 3 + 1 / 2)
    assert (found.low, found.high) == pytest.approx((0.003 - half, 0.003 + half))
    # seeds that differ more than those of other conditions keep the wider interval of their own
    assert difference(EQUAL, OTHERS, pool) == difference(EQUAL, OTHERS)
    assert mean(OTHERS, pool=pool).high == mean(OTHERS).high > 0.929 + quantile * pool.deviation / math.sqrt(2)
    scaled = spread([[100 * value for value in group] for group in (SOME, OTHERS, EQUAL)])
    assert pool.times(100).deviation == pytest.approx(scaled.deviation)


def test_one_seed_or_seeds_without_any_spread_have_no_interval():
    assert mean([0.5], pool=spread([SOME])) == Mean(0.5, None, None, 1)
    assert mean(EQUAL).low is None
    assert difference([0.5], SOME, spread([SOME])).low is None
    assert difference(EQUAL, [0.75, 0.75]).high is None


def test_a_report_draws_no_interval_without_width_where_seeds_of_one_condition_are_equal(study, tmp_path):
    outcomes = []
    for position, one in enumerate(study.outcomes[: 3 * SEEDS]):
        folder = tmp_path / str(position)
        metrics = {"accuracy": 0.926 if one.member.settings["privacy.eps"] == "10" else 0.9 + 0.001 * position}
        outcomes.append(done(folder, one.member, metrics))
    outcomes.append(done(tmp_path / "k", member("k", {"privacy.eps": "10", "privacy.k": "4"}, 0), {"accuracy": 0.92}))
    write_report(dataclasses.replace(study, outcomes=tuple(outcomes), audits=()), tmp_path / "report")
    rows = Page((tmp_path / "report" / "report.html").read_text(encoding="utf-8")).rows
    deviation, quantile = pooled([90.0, 90.1], [92.6, 92.6], [90.4, 90.5])
    half = quantile * deviation / math.sqrt(SEEDS)
    shown = [row[3] for row in rows if row[0] in ("eps 10", "k 1")]
    assert shown == [f"92.6 {92.6 - half:.1f} to {92.6 + half:.1f}"] * 2  # by epsilon and by k


def test_a_group_is_compared_with_the_one_condition_of_other_groups_that_differs_in_its_key_alone(study):
    found = {one.title: one for one in comparisons([read_row(outcome) for outcome in study.outcomes])}
    assert list(found) == ["epsilon", "k", "rank", "targets"]
    assert [one.eps for one in found["epsilon"].conditions] == [1, 10, math.inf]
    assert [found["k"].value(one) for one in found["k"].conditions] == [1, 4, 8, 12]
    assert [found["rank"].value(one) for one in found["rank"].conditions] == [2, 4, 8]
    assert found["rank"].own == 1
    assert found["targets"].value(found["targets"].conditions[0]) == "default"
    assert [len(one.rows) for one in found["rank"].conditions] == [1, SEEDS, 1]


def test_grids_of_one_seed_stand_side_by_side(page):
    assert sum(one.startswith("data:image/png") for one in page.loaded) == 3
    assert "seed 0 everywhere" in page.text


def test_a_plot_has_a_point_per_seed_the_references_as_lines_and_no_privacy_behind_a_break():
    series = Series({1.0: [87, 84, 88], 10.0: [91, 90], math.inf: [90]})
    lines = {"ceiling": 98.4, "floor": 10.0}
    figure = draw_scores([series], lines, "eps", "%", of_epsilon=True, marks=[Mark("other", 10.0, 80.0)])
    axes = figure.axes[0]
    scattered = [drawn for drawn in axes.collections if isinstance(drawn, PathCollection)]
    points = {tuple(point) for drawn in scattered for point in np.round(drawn.get_offsets(), 6).tolist()}
    assert points == {(0, 87), (0, 84), (0, 88), (1, 91), (1, 90), (1.5, 90)}
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "10", "no privacy"]
    assert [(line.get_ydata()[0], line.get_label()) for line in axes.lines if line.get_label().startswith("ceil")] == [
        (98.4, "ceiling: 98.4")
    ]
    texts = [text.get_text() for text in axes.texts]
    assert "floor: 10.0 (below the axis)" in texts
    assert "other" in texts
    assert [line.get_gid() for line in axes.lines].count("break") == 1
    low, high = mean([87, 84, 88]).low, mean([91, 90]).high
    assert axes.get_ylim()[0] < min(low, 80)
    assert axes.get_ylim()[1] > min(high, 98.4)


def test_epsilon_over_steps_is_that_of_the_release_and_its_text_is_computed(study, page):
    with (study.outcomes[SEEDS].folder / "finetune" / "epsilon.csv").open(encoding="utf-8") as file:
        points = [(float(line["step"]), float(line["epsilon"])) for line in csv.DictReader(file)]
    half = next(step for step, epsilon in points if epsilon >= points[-1][1] / 2)
    assert f"is spent by step {half:g} of {points[-1][0]:g}" in page.text


def test_bounds_are_those_of_the_accountant_and_audits_find_the_plan_that_they_attacked(study, tmp_path):
    rows = [read_row(outcome) for outcome in study.outcomes]
    published = audit_lines(tmp_path / "a.jsonl", {"privacy.k": "4"}, {1.0: 0.1})
    unknown = {**published[0], "settings": "0" * 64}
    found = bounds_of(rows, [*study.audits, *published, unknown, {"torn": 1}])
    shown = {(one.accounting, one.k, one.measured): one for one in found}
    assert {("per_unit", 1, 0.05), ("per_unit", 4, 0.1), ("unknown", None, 0.1)} <= set(shown)
    plan = make_plan(configured("mnist5k", {**FEW_STEPS, "privacy.k": "4"}))
    apart = shown["published", 4, None]
    # Opacus' own search for the noise ends within a hundredth of the target
    assert apart.claimed == pytest.approx(spent(plan, plan.steps).epsilon, rel=1e-2)
    bounded = spent(dataclasses.replace(plan, accounting="published"), plan.steps).epsilon
    assert apart.bounded == pytest.approx(bounded, rel=1e-2)
    assert apart.bounded > 2 * apart.claimed


def test_an_audit_of_the_released_clipping_stands_beside_its_claim_and_bound_and_leads_to_its_run(study, tmp_path):
    one = next(outcome for outcome in study.outcomes if outcome.member.settings.get("privacy.k") == "4")
    apart = audit_lines(tmp_path / "a.jsonl", {"privacy.k": "4", "privacy.accounting": "published"}, {1.0: 0.75})
    audited = dataclasses.replace(one, runs={**one.runs, "audit-eps1-published": "a" * 32})
    write_report(dataclasses.replace(study, outcomes=(audited,), audits=tuple(apart)), tmp_path / "report")
    (line,) = [line for line in lines_of(tmp_path / "report" / "bounds.csv") if line["measured"]]
    assert [line[name] for name in ("accounting", "k", "verdict")] == ["published", "4", "not refuted"]
    assert line["measured"] == "0.75"
    assert float(line["claimed"]) == pytest.approx(1.0, rel=1e-2)
    assert float(line["bounded"]) > 5
    found = Page((tmp_path / "report" / "report.html").read_text(encoding="utf-8"))
    assert any("/runs/" + "a" * 32 in link for link in found.links)


def test_a_study_of_captions_is_reported_without_a_word_of_classes(tmp_path):
    outcomes = []
    for eps, style in (("10", 0.49), ("inf", 0.54)):
        metrics = {"samples": 8.0, "private_style": style, "private_style_base": 0.18, "private_style_real": 0.85}
        metrics |= {"fid": 60 - 10 * style, "clip_score": 27.0 + style}
        one = member("epsilon", {"privacy.eps": eps}, 0)
        outcomes.append(done(tmp_path / eps, one, metrics, ["a red apple", "a $5 note"], device="one GPU", gpus=1))
    write_report(Study("emoji", "Emoji", tuple(outcomes), None, None), tmp_path / "report")
    found = Page((tmp_path / "report" / "report.html").read_text(encoding="utf-8"))
    text = found.text
    assert "Private style goes up by 5.0 points, from 49.0 at eps 10 to 54.0 without privacy; one seed" in text
    assert "base before fine-tuning: 18.0 (below the axis)" in text
    assert "FID" in text
    assert "CLIP score" in text
    assert "class agreement, %" not in "".join(map(str, found.rows))
    assert "Not measured here: accuracy, %, class agreement, %." in text
    assert [row[4] for row in found.rows if row[0] == "eps=10" and len(row) == 6] == [f"{150.5 / 3600:.2f}"]
    sources = {system.source for system in read_systems()}
    assert {link for link in found.links if link.startswith("http")} <= sources


def test_a_member_that_is_done_and_lacks_a_file_is_named_and_nothing_stops(study, tmp_path):
    one = study.outcomes[0]
    bare = tmp_path / "bare"
    write_json(bare / "evaluation" / "metrics.json", {"accuracy": 0.5})
    write_report(dataclasses.replace(study, outcomes=(dataclasses.replace(one, folder=bare),), audits=()), tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "left no finetune/release/privacy.json, no samples/grid.png" in text.replace("\\", "")


def test_a_study_without_members_is_a_page_too(tmp_path):
    write_report(Study("empty", "Empty", (), None, None), tmp_path)
    assert "no members" in Page((tmp_path / "report.html").read_text(encoding="utf-8")).text


def test_published_figures_need_a_source_and_stand_in_plots_of_their_own_pictures_alone(tmp_path):
    assert all(system.source.startswith("https://") for system in read_systems())
    shipped = [figure for system in read_systems() for figure in system.figures]
    assert {config for figure in shipped for config in figure.configs} <= {*config_names()}
    assert {figure.metric for figure in shipped} <= {score.metric for score in SCORES}
    figure = {"metric": "accuracy", "value": 0.9, "epsilon": 10, "delta": None, "configs": ["mnist5k"], "stated": "x"}
    system = {"name": "other", "source": "https://example.org", "note": None, "figures": [figure]}
    path = tmp_path / "figures.yaml"
    path.write_text(json.dumps({"systems": [system]}), encoding="utf-8")
    (found,) = read_systems(path)
    assert [one.value for one in found.of(["mnist5k", "standin"])] == [0.9]
    assert found.of(["emoji"]) == []
    for wrong in ({**system, "source": "heard of"}, {**system, "figures": [{**figure, "value": "nan"}]}, {"name": "x"}):
        path.write_text(json.dumps({"systems": [wrong]}), encoding="utf-8")
        with pytest.raises(InputError, match=r"figures\.yaml: not in the form"):
            read_systems(path)


def test_two_writes_of_one_study_are_equal(study, tmp_path):
    some = dataclasses.replace(study, outcomes=study.outcomes[:: 2 * SEEDS], audits=())
    for name in ("first", "second"):
        write_report(some, tmp_path / name)
    for name in ("report.html", "report.md", "members.csv", "summary.csv", "bounds.csv", "costs.csv"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name
