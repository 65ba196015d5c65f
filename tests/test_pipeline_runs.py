"""Real runs of the CelebA-HQ and EMNIST pipelines in a copy of the project, from downloads to scores."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from dp_lora.cli.pipelines import PIPELINES
from dp_lora.config import ROOT
from dp_lora.data.layout import read_dataset
from dp_lora.data.png import encode_png
from dp_lora.files import digest_file, read_json
from tests.support.download_server import Server, serving
from tests.support.emnist_project import LITTLE, emnist_and_mnist, project_with_a_tiny_experiment
from tests.support.golden import TINY, checkpoint
from tests.support.inception import write_stand_in
from tests.support.prepare_call import clone
from tests.support.served import CLASSES, REVISION, ROWS, SETTINGS, archive, parquet, path_of
from tests.support.tiny import TINY as TINY_LETTERS

SIZE = 64  # pixels of the pictures that the small cin256 checkpoint is for
ARCHIVE = "/files/cin.zip"


@pytest.fixture
def server() -> Iterator[Server]:
    """A server with a small dataset and a small checkpoint in the form of CelebA-HQ's and cin256's."""
    with serving() as running:
        for number, (file, rows) in enumerate(ROWS.items()):
            rng = np.random.default_rng(number)
            pictures = [encode_png(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)) for _ in range(rows)]
            running.files[path_of(file)] = parquet(pictures, rng.integers(0, 2, rows).tolist())
        running.files[ARCHIVE] = archive(checkpoint("cin256").read_bytes())
        yield running


def small_celebahq(server: Server, folder: Path) -> str:
    """Overrides that make `celebahq` as small as the server's files."""
    weights = folder / "weights.pt"
    digest = write_stand_in(weights)
    return (
        f"{SETTINGS.replace('data.size=16', f'data.size={SIZE}')} {TINY['cin256']} "
        f"checkpoint.folder=data/cin256 checkpoint.url={server.url}{ARCHIVE} "
        "data.n_public=50 privacy.batch_size=25 privacy.epochs=1 privacy.delta=1e-3 lora.rank=2 train.grid_every=0 "
        "sampling.n=8 sampling.steps=2 sampling.batch_size=4 evaluation.classifier_steps=2 evaluation.min_images=4 "
        f"evaluation.inception_weights={weights} evaluation.inception_sha256={digest} compute.device=cpu"
    )


def run(project: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{project}/mlflow.db"}
    environment |= {"DPLORA_PYTHON": sys.executable, "DVC_NO_ANALYTICS": "1"}
    environment.pop("MLFLOW_RUN_ID", None)
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)


def status(project: Path) -> str:
    return subprocess.run(["git", "status", "--short"], cwd=project, capture_output=True, text=True, check=True).stdout


def main_makes_all_and_a_second_call_nothing(project: Path, name: str, *arguments: str) -> None:
    pipeline, experiment = PIPELINES[name], arguments[1]
    made = run(project, "entrypoints.main", *arguments)
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-3000:]
    assert "trainable parameters" in made.stdout
    for stage in ("count_params", "finetune/release", "samples", "evaluation"):
        assert (project / "outputs" / experiment / stage).is_dir()
    again = run(project, "entrypoints.main", *arguments)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "nothing to do" in again.stdout
    assert "Running stage" not in again.stdout
    # the default pipeline's parameters and lock have not changed
    changed = {line[3:] for line in status(project).splitlines()}
    folder = str(Path(pipeline.file).parent)
    assert changed == {"data.dvc", f"{folder}/dvc.lock", f"{folder}/params.yaml", f"{folder}/figures/"}


def bare_repro_reruns_finetune_and_what_follows(project: Path, name: str, experiment: str) -> None:
    params = project / PIPELINES[name].file.replace("dvc.yaml", "params.yaml")
    params.write_text(params.read_text().replace("eps: null", "eps: 5"))
    base = list(PIPELINES[name].made)[-1]
    result = run(project, "dvc", "repro", PIPELINES[name].file)
    assert result.returncode == 0, result.stderr[-3000:]
    ran = {line.split(":")[1].strip("'") for line in result.stdout.splitlines() if line.startswith("Running stage")}
    assert ran == {"resolve", "finetune", "sample", "fid"}
    assert f"{base} missing" not in result.stderr
    shown = json.loads(run(project, "dvc", "metrics", "show", "--json").stdout)
    figures = shown[""]["data"][f"outputs/{experiment}/finetune/metrics.json"]["data"]
    assert 0 < figures["epsilon"] <= 5


def plots_and_experiments_show(project: Path, experiment: str) -> None:
    plots = run(project, "dvc", "plots", "show", "--out", "dvc_plots")
    assert plots.returncode == 0, plots.stderr[-2000:]
    page = (project / "dvc_plots/index.html").read_text(encoding="utf-8")
    assert "epsilon over the steps" in page
    assert f"outputs_{experiment}_samples_grid.png" in " ".join(
        path.name for path in project.rglob("dvc_plots/static/*")
    )
    table = run(project, "dvc", "exp", "show", "--csv")
    assert table.returncode == 0, table.stderr[-2000:]
    workspace = next(csv.DictReader(table.stdout.splitlines()))
    assert 0 < float(workspace["epsilon"]) <= 5


def missing_data_are_named(project: Path, name: str) -> None:
    private = str(PIPELINES[name].private)
    (project / private).rename(project / "away")
    stopped = run(project, "dvc", "repro", PIPELINES[name].file)
    assert stopped.returncode != 0
    lines = [
        line
        for line in stopped.stderr.splitlines()
        if line.startswith(f"{private}: missing; type `.venv/bin/mlflow run")
    ]
    assert len(lines) == 1
    assert f"`dvc pull {private}`" in lines[0]
    (project / "away").rename(project / private)


def the_base_is_the_checkpoint_and_the_scores_are_of_these_pictures(project: Path) -> None:
    digest = digest_file(checkpoint("cin256"))
    base = read_json(project / "outputs/cin256/base/model.json")
    assert base["trained_on"] == {"source": "imagenet", "checkpoint": digest, "ema": False}
    made = project / "outputs/celebahq"
    statement = read_json(made / "finetune/release/privacy.json")
    assert (statement["k"], statement["steps"], statement["private"]) == (2, 2, True)
    assert 0 < statement["epsilon"] <= 10
    drawn = read_dataset(made / "samples", CLASSES, "synthetic")
    assert drawn.images(slice(None)).shape == (8, SIZE, SIZE, 3)
    assert drawn.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    scores = read_json(made / "evaluation/metrics.json")
    assert scores["fid"] > 0
    assert 0 <= scores["accuracy"] <= 1


def every_stage_has_its_run_that_names_what_it_read(project: Path) -> None:
    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    runs = client.search_runs([found.experiment_id for found in client.search_experiments()])
    of = {found.data.tags["stage"]: found for found in runs}
    stages = ["count_params", "fid", "finetune", "import_base", "sample"]
    assert sorted(found.data.tags["stage"] for found in runs) == sorted([*stages, "main", "prepare"])
    assert {found.info.status for found in runs} == {"FINISHED"}
    assert {of[stage].data.tags["mlflow.parentRunId"] for stage in stages} == {of["main"].info.run_id}
    assert of["fid"].data.metrics["fid"] == read_json(project / "outputs/celebahq/evaluation/metrics.json")["fid"]
    assert of["finetune"].data.metrics["epsilon"] == of["main"].data.metrics["epsilon"]
    for stage, folder in (("import_base", "cin256"), ("finetune", "celebahq"), ("prepare", "celebahq")):
        source = read_json(project / "data" / folder / "source.json")
        named = [{tag.key: tag.value for tag in entry.tags} for entry in of[stage].inputs.dataset_inputs]
        assert source["origin"] in [tags.get("origin") for tags in named], stage
        # no run records a hash of private pictures
        assert (source["sha256"] in [tags.get("sha256") for tags in named]) is (folder == "cin256"), stage
    for stage in ("finetune", "sample", "fid"):
        (base,) = (entry for entry in of[stage].inputs.dataset_inputs if entry.dataset.name == "base")
        tags = {tag.key: tag.value for tag in base.tags}
        assert tags["digest"] == of["finetune"].data.tags["base_digest"]
        assert tags["dvc"].endswith(".dir")
    assert REVISION in [tag.value for entry in of["finetune"].inputs.dataset_inputs for tag in entry.tags]


def the_documented_command_runs_the_experiment_at_eps_1(project: Path, overrides: str) -> None:
    given = ["-P", "config=celebahq-eps1", "-P", f"overrides={overrides}"]
    result = run(project, "mlflow", "run", ".", "-b", "native", "-e", "main", *given)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    statement = read_json(project / "outputs/celebahq-eps1/finetune/release/privacy.json")
    assert 0 < statement["epsilon"] <= 1
    assert read_json(project / "outputs/celebahq-eps1/evaluation/metrics.json")["fid"] > 0


@pytest.mark.slow
def test_emnist_goes_from_prepared_pictures_to_scores_by_main_and_by_dvc_repro(tmp_path):
    project = project_with_a_tiny_experiment(tmp_path / "project")
    stopped = run(project, "entrypoints.main", "--config", "emnist-tiny")
    assert stopped.returncode == 1
    assert stopped.stderr.startswith(
        "error: data/emnist and data/mnist: missing; type `.venv/bin/mlflow run . -b native"
    )
    assert status(project) == ""

    emnist_and_mnist(project)
    main_makes_all_and_a_second_call_nothing(project, "emnist", "--config", "emnist-tiny")
    bare_repro_reruns_finetune_and_what_follows(project, "emnist", "emnist-tiny")
    plots_and_experiments_show(project, "emnist", "emnist-tiny")
    missing_data_are_named(project, "emnist")


@pytest.mark.slow
def test_celebahq_goes_from_prepare_to_fid_through_the_real_clients_and_all_its_stages(tmp_path, server, monkeypatch):
    project = clone(ROOT, tmp_path / "project")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    arguments = ["--config", "celebahq", "--overrides", small_celebahq(server, tmp_path)]
    prepared = run(project, "entrypoints.prepare", *arguments)
    assert prepared.returncode == 0, prepared.stderr[-3000:]
    asked = {path for method, path, _ in server.requests if method == "GET"}
    assert asked >= set(server.files)
    server.files.clear()  # a later download would fail

    main_makes_all_and_a_second_call_nothing(project, "celebahq", *arguments)
    the_base_is_the_checkpoint_and_the_scores_are_of_these_pictures(project)
    every_stage_has_its_run_that_names_what_it_read(project)
    bare_repro_reruns_finetune_and_what_follows(project, "celebahq", "celebahq")
    the_documented_command_runs_the_experiment_at_eps_1(project, arguments[3])
    missing_data_are_named(project, "celebahq")


@pytest.mark.slow
def test_a_folder_of_one_s_own_goes_from_pictures_to_scores_by_the_documented_command(tmp_path):
    project = clone(ROOT, tmp_path / "project")
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(30):
            noise = np.random.default_rng(number).integers(0, 256, (20, 20), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "pictures" / name / f"{number}.png")
    own = f"{TINY_LETTERS.replace('data.classes=[x,y]', 'data.classes=[cat,dog]')} {LITTLE}"
    given = ["-P", "config=folder", "-P", f"overrides=data.path={tmp_path}/pictures {own}"]
    result = run(project, "mlflow", "run", ".", "-b", "native", "-e", "main", *given)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    statement = read_json(project / "outputs/folder/finetune/release/privacy.json")
    assert 0 < statement["epsilon"] <= 10
    assert 0 <= read_json(project / "outputs/folder/evaluation/metrics.json")["accuracy"] <= 1
