"""`make ui` starts the server over the local store and prints its links; one line tells why a store is unusable."""

import base64
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import urllib.request
import zlib
from urllib.parse import parse_qs, unquote

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from dp_lora import tracking
from dp_lora.config import ROOT, load
from dp_lora.errors import InputError
from dp_lora.tracking import reachable, shared_view
from dp_lora.tracking.links import chart_page, comparison_page, view_page
from tests.support.tracking_server import free_port
from tests.support.tracking_store import use_store

PAGES = "workflowType=machine_learning"  # without it MLflow 3.17 shows its menu for agents
SHOWN = ("SCATTER", "LINE", "IMAGE")  # MLflow's kinds of charts


@pytest.fixture
def client(tmp_path, monkeypatch):
    return use_store(tmp_path, monkeypatch)


def scored_run(eps: str, accuracy: float, stage: str = "fid") -> str:
    with tracking.run(stage, load("mnist5k", {"eps": eps})) as run:
        run.metric("accuracy", accuracy)
    return run.run_id


def test_the_links_lead_to_charts_the_latest_run_per_epsilon_and_the_newest_grid(client):
    assert tracking.ui_links("http://x") == {"runs": "http://x/#/experiments"}
    scored_run("5", 0.1)
    runs = {eps: scored_run(eps, 0.5) for eps in ("10", "inf", "1", "5")}
    with tracking.run("sample", load("mnist5k")) as sample:
        pass
    links = tracking.ui_links("http://x")
    view = f"http://x/#/experiments/{sample.experiment_id}/runs?{PAGES}&viewStateShareKey=dp-lora"
    assert list(links)[:2] == ["charts", "table"]
    assert links["charts"] == f"{view}&compareRunsMode=CHART"
    assert links["table"] == view
    query = parse_qs(links["latest run per epsilon"].partition("?")[2])
    assert json.loads(query["runs"][0]) == [runs["1"], runs["5"], runs["10"], runs["inf"]]
    assert json.loads(query["experiments"][0]) == [sample.experiment_id]
    grid = f"http://x/#/experiments/{sample.experiment_id}/runs/{sample.run_id}/artifacts/grid.png?{PAGES}"
    assert links["newest sample grid"] == grid
    assert unquote(comparison_page("", "1", ["a", "b"])) == f'/#/compare-runs?runs=["a", "b"]&experiments=["1"]&{PAGES}'


def test_the_links_lead_where_the_newest_run_is_unless_the_environment_names_an_experiment(client, monkeypatch):
    own = scored_run("5", 0.5)
    theirs = client.create_experiment("another program's")
    client.set_terminated(client.create_run(theirs).info.run_id)
    assert tracking.ui_links("http://x")["table"] == view_page("http://x", client.get_run(own).info.experiment_id)
    # MLflow's Docker runner makes its run in "Default" before our code starts
    monkeypatch.setenv("MLFLOW_RUN_ID", client.create_run("0").info.run_id)
    scored_run("5", 0.5)
    monkeypatch.delenv("MLFLOW_RUN_ID")
    client.set_terminated(client.search_runs(["0"])[0].info.run_id)
    assert tracking.ui_links("http://x") == {
        "charts": view_page("http://x", "0", charts=True),
        "table": view_page("http://x", "0"),
    }
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "dp-lora")
    assert tracking.ui_links("http://x")["table"] == view_page("http://x", client.get_run(own).info.experiment_id)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "no-such")
    assert tracking.ui_links("http://x") == {"runs": "http://x/#/experiments"}


def saved_view(client, experiment_id: str) -> dict:
    """The view that MLflow's page reads from an experiment's tag."""
    saved = json.loads(client.get_experiment(experiment_id).tags[shared_view.VIEW])
    assert saved["name"] == "Privacy and utility"
    packed = saved["state"].removeprefix("deflate;")
    return json.loads(zlib.decompress(base64.b64decode(packed)))


def test_a_new_experiment_opens_as_training_with_the_columns_and_charts_of_privacy_and_utility(client):
    run_id = scored_run("5", 0.5)
    experiment = client.get_run(run_id).info.experiment_id
    assert client.get_experiment(experiment).tags[shared_view.KIND] == "custom_model_development"
    view = saved_view(client, experiment)
    distances = ["letter_frechet_distance", "fid"]
    names = ["epsilon", "delta", "rank", "k", "accuracy", *distances]
    assert view["selectedColumns"] == [f"metrics.`{name}`" for name in names]
    charts = {kind: [one for one in view["compareRunCharts"] if one["type"] == kind] for kind in SHOWN}
    assert sum(map(len, charts.values())) == len(view["compareRunCharts"])
    drawn = [(one["xaxis"]["key"], one["yaxis"]["key"]) for one in charts["SCATTER"]]
    assert drawn == [("epsilon", name) for name in ("accuracy", *distances)]
    assert [one["metricKey"] for one in charts["LINE"]] == ["epsilon"]
    assert [one["imageKeys"] for one in charts["IMAGE"]] == [["grid"], ["grids"]]


def test_a_store_made_before_gets_the_view_and_keeps_a_kind_that_somebody_chose(client):
    experiment = client.create_experiment("dp-lora", tags={shared_view.KIND: "genai_development"})
    scored_run("5", 0.5)
    tags = client.get_experiment(experiment).tags
    assert tags[shared_view.KIND] == "genai_development"
    assert shared_view.VIEW in tags


def test_the_view_that_is_printed_has_the_distances_of_the_runs_alone(client):
    with tracking.run("fid", load("mnist5k", {"eps": "5"})) as run:
        run.metric("letter_frechet_distance", 3.0)
    tracking.ui_links("http://x")
    view = saved_view(client, run.experiment_id)
    assert view["selectedColumns"][-1] == "metrics.`letter_frechet_distance`"
    drawn = [one["yaxis"]["key"] for one in view["compareRunCharts"] if one["type"] == "SCATTER"]
    assert drawn == ["accuracy", "letter_frechet_distance"]


def test_a_store_that_takes_no_tag_of_an_experiment_tracks_runs_and_its_link_is_the_plain_chart_page(
    client, monkeypatch
):
    def refuse(self, experiment_id, key, value):
        raise MlflowException("not allowed")

    monkeypatch.setattr(MlflowClient, "set_experiment_tag", refuse)
    run_id = scored_run("5", 0.5)
    experiment = client.get_run(run_id).info.experiment_id
    assert tracking.ui_links("http://x") == {"charts": chart_page("http://x", experiment)}


def ui(*arguments: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "dp_lora", "ui", *arguments]
    given = {**os.environ, **environment}
    return subprocess.Popen(command, cwd=ROOT, env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_the_server_comes_up_over_the_store_prints_links_and_ends_with_ctrl_c(client):
    run_id = scored_run("5", 0.5, stage="sample")
    port = free_port()
    process = ui("--port", str(port))
    lines: list[str] = []
    while not any("Ctrl-C" in line for line in lines):
        lines.append(process.stdout.readline())
        assert lines[-1] or process.poll() is None, process.stderr.read()
    links = dict(re.findall(r"^(.*?)  +(http://\S+)$", "".join(lines), re.MULTILINE))
    assert links["MLflow UI"] == f"http://127.0.0.1:{port}"
    assert run_id in links["newest sample grid"]
    with urllib.request.urlopen(f"{links['MLflow UI']}/ajax-api/2.0/mlflow/runs/get?run_id={run_id}") as answer:
        assert json.load(answer)["run"]["info"]["run_name"] == "mnist5k eps=5 r=4 k=1 sample"

    second = ui("--port", str(port))
    assert second.wait(60) == 1
    assert second.stderr.read().startswith(f"error: port {port} of 127.0.0.1 is in use")

    # with a server's address it starts nothing, but prints the same links
    elsewhere = ui(MLFLOW_TRACKING_URI=links["MLflow UI"])
    assert elsewhere.wait(120) == 0, elsewhere.stderr.read()
    assert links["newest sample grid"] in elsewhere.stdout.read()

    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_store_of_another_mlflow_is_one_line_that_says_what_to_do(client, tmp_path):
    for revision, words in (("451aebb31d03", "mlflow db upgrade 'sqlite:///"), ("f" * 12, "newer MLflow; update")):
        with sqlite3.connect(tmp_path / "mlflow.db") as database:
            database.execute("UPDATE alembic_version SET version_num = ?", [revision])
        with pytest.raises(InputError, match=re.escape(words)):
            tracking.ui_links("http://x")


def test_the_installed_mlflow_s_own_store_has_the_newest_revision(client, tmp_path):
    assert reachable.schema_problem(tmp_path / "mlflow.db") is None


@pytest.mark.slow
def test_a_server_that_is_not_there_is_one_line_and_nothing_is_trained(tmp_path):
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"http://me:secret@127.0.0.1:{free_port()}"}
    environment.pop("MLFLOW_RUN_ID", None)
    command = [sys.executable, "-m", "dp_lora", "count_params", "--overrides", "lora.rank=3"]
    with pytest.raises(InputError, match=r"no server is there; start it"):
        tracking_connect(environment["MLFLOW_TRACKING_URI"])
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "no server is there; start it" in line
    assert "secret" not in done.stdout + done.stderr


def tracking_connect(uri: str) -> None:
    from dp_lora.tracking.store import connect

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        connect()
