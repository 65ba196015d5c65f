"""`make test-ui`: the UI in a real browser, over runs that the test trains in minutes."""

import json
import sqlite3
from types import SimpleNamespace

import pytest

from dp_lora import tracking
from dp_lora.commands.ui import server
from dp_lora.tracking.links import artifact_page
from dp_lora.tracking.shared_view import TITLE
from dp_lora.tracking.store import connect
from tests.support.browser import (
    browser_page,
    chart_lines,
    chart_picture_width,
    compared_values,
    metric_columns,
    open_page,
    scatter,
)
from tests.support.tiny_project import EPSILONS, run, tiny_project
from tests.support.tracking_server import free_port

pytestmark = [pytest.mark.ui, pytest.mark.timeout(3600)]
GRID_WIDTH = "() => Math.max(0, ...[...document.images].map(image => image.naturalWidth))"
WIDTHS = (1500, 800)
MLFLOWS_OWN = (
    # the page asks for the user's name, which a server without accounts does not know
    "/ajax-api/2.0/mlflow/users/current",
    # Chromium says this when a layout takes more than a frame
    "ResizeObserver loop completed with undelivered notifications.",
)


@pytest.fixture(scope="module")
def ui(tmp_path_factory):
    """A server over the runs of three trainings: its address, the ids of experiment and runs, the links."""
    project = tiny_project(tmp_path_factory.mktemp("ui") / "project")
    filled = run(project, "tests.support.fill_store")
    assert filled.returncode == 0, filled.stderr[-3000:]
    with sqlite3.connect(project / "mlflow.db") as database:
        ((experiment,),) = database.execute("SELECT experiment_id FROM experiments WHERE name = 'dp-lora'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/mlflow.db")
        with server(free_port()) as (address, _):
            runs = json.loads((project / "filled.json").read_text())
            links = tracking.ui_links(address)
            yield SimpleNamespace(address=address, experiment=str(experiment), runs=runs, links=links)


def unexpected(errors: list[str]) -> list[str]:
    return [error for error in errors if not any(known in error for known in MLFLOWS_OWN)]


def test_the_comparison_the_chart_and_a_grid_show_what_three_trainings_logged(ui, tmp_path):
    with browser_page() as (page, errors):
        scored = [ui.runs[eps]["fid"] for eps in EPSILONS]
        shown = compared_values(page, ui.address, ui.experiment, scored, ["epsilon", "delta", "rank", "accuracy"])
        for eps, epsilon in zip(EPSILONS, shown["epsilon"], strict=True):
            assert 0.9 * float(eps) < epsilon <= float(eps)
        assert shown["delta"] == [0.001] * 3
        assert shown["rank"] == [2] * 3
        points = scatter(page, "epsilon", "accuracy", tmp_path / "scatter.png")
        assert [x for x, _ in points] == pytest.approx(shown["epsilon"], rel=1e-2)
        assert [y for _, y in points] == pytest.approx(shown["accuracy"], rel=1e-2)
        open_page(page, artifact_page(ui.address, ui.experiment, ui.runs["5"]["sample"], "grid.png"), "grid.png")
        page.wait_for_function(f"({GRID_WIDTH})() > 100")
        assert unexpected(errors) == []
    assert (tmp_path / "scatter.png").stat().st_size > 10_000


@pytest.mark.parametrize("width", WIDTHS)
def test_the_shared_view_draws_utility_against_epsilon_epsilon_over_steps_and_the_grids(ui, tmp_path, width):
    client = connect()
    logged = [client.get_run(ui.runs[eps]["fid"]).data.metrics for eps in EPSILONS]
    with browser_page(width) as (page, errors):
        text = open_page(page, ui.links["charts"], "epsilon vs. accuracy")
        assert "Model registry" in text  # the menu for training alone has it
        for name in ("accuracy", "letter_frechet_distance"):
            (points,) = chart_lines(page, f"epsilon vs. {name}", len(EPSILONS), tmp_path / f"{name}.png")
            wanted = sorted((metrics["epsilon"], metrics[name]) for metrics in logged)
            assert sorted(points) == [pytest.approx(point, rel=1e-6) for point in wanted]
        history = client.get_metric_history(ui.runs["5"]["finetune"], "epsilon")
        spent = sorted((metric.step, metric.value) for metric in history)
        assert len(spent) > 1
        lines = chart_lines(page, "epsilon", len(EPSILONS) * len(spent), tmp_path / "epsilon.png")
        assert [pytest.approx(point, rel=1e-6) for point in spent] in [sorted(line) for line in lines]
        for name in ("grid", "grids"):
            assert chart_picture_width(page, name) > 100
        assert unexpected(errors) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_the_shared_view_has_privacy_and_utility_as_columns(ui, width):
    with browser_page(width) as (page, errors):
        open_page(page, ui.links["table"], TITLE)
        names = ["epsilon", "delta", "rank", "k", "accuracy", "letter_frechet_distance"]
        assert metric_columns(page, names[-1]) == names
        assert unexpected(errors) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_a_run_begins_with_its_privacy_and_leads_to_the_registered_model(ui, width):
    with browser_page(width) as (page, errors):
        address = f"{ui.address}/#/experiments/{ui.experiment}/runs/{ui.runs['5']['finetune']}"
        open_page(page, address, "Neighbouring relation: add-or-remove-one.")
        described = page.get_by_text("Neighbouring relation: add-or-remove-one.").first
        top = page.get_by_text("Description", exact=True).first
        assert 0 < described.bounding_box()["y"] - top.bounding_box()["y"] < 60
        open_page(page, ui.links["newest registered model"], "eps5")
        assert unexpected(errors) == []
