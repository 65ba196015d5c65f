"""`make test-ui`: the UI in a real browser, over runs that were trained for it (minutes)."""

import json
import sqlite3
from pathlib import Path

import pytest

from dp_lora.tracking.links import artifact_page
from entrypoints.ui import server
from tests.support.browser import browser_page, compared_values, open_page, scatter
from tests.support.tiny_project import EPSILONS, run, tiny_project
from tests.support.tracking_server import free_port

pytestmark = [pytest.mark.ui, pytest.mark.timeout(3600)]
GRID_WIDTH = "() => Math.max(0, ...[...document.images].map(image => image.naturalWidth))"


def test_the_comparison_the_chart_and_a_grid_show_what_three_trainings_logged(tmp_path, monkeypatch):
    project = tiny_project(tmp_path / "project")
    filled = run(project, "tests.support.fill_store")
    assert filled.returncode == 0, filled.stderr[-3000:]
    runs = json.loads((project / "filled.json").read_text())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/mlflow.db")
    with sqlite3.connect(project / "mlflow.db") as database:
        ((experiment,),) = database.execute("SELECT experiment_id FROM experiments WHERE name = 'dp-lora'")
    with server(free_port()) as (address, _), browser_page() as (page, errors):
        scored = [runs[eps]["fid"] for eps in EPSILONS]
        shown = compared_values(page, address, str(experiment), scored, ["epsilon", "delta", "rank", "accuracy"])
        for eps, epsilon in zip(EPSILONS, shown["epsilon"], strict=True):
            assert 0.9 * float(eps) < epsilon <= float(eps)
        assert shown["delta"] == [0.001] * 3
        assert shown["rank"] == [2] * 3
        points = scatter(page, "epsilon", "accuracy", tmp_path / "scatter.png")
        assert [x for x, _ in points] == pytest.approx(shown["epsilon"], rel=1e-2)
        assert [y for _, y in points] == pytest.approx(shown["accuracy"], rel=1e-2)
        open_page(page, artifact_page(address, str(experiment), runs["5"]["sample"], "grid.png"), "grid.png")
        page.wait_for_function(f"({GRID_WIDTH})() > 100")
        # MLflow's UI asks for the user's name, which a server without accounts does not know
        assert [error for error in errors if not error.endswith("/ajax-api/2.0/mlflow/users/current")] == []
    assert Path(tmp_path / "scatter.png").stat().st_size > 10_000
