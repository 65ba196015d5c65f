"""The CelebA-HQ and EMNIST pipelines as they are run: in a copy of the project, with tiny data and a tiny base."""

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_evaluation_inception import write_stand_in
from tiny import make_base, tiny_config, tiny_dataset

from dp_lora.config import ROOT
from dp_lora.data.layout import Picture, write_dataset
from dp_lora.data.png import encode_png
from dp_lora.files import write_json
from entrypoints.pipelines import PIPELINES

LITTLE = (
    "autoencoder.epochs=1 autoencoder.batch_size=6 ldm.epochs=1 ldm.batch_size=6 sampling.n=8 "
    "evaluation.classifier_steps=2 evaluation.min_images=4"
)
FOLDERS = {
    "celebahq": "checkpoint.folder=data/cin256 data.folder=data/celebahq model.base=outputs/cin256/base",
    "emnist": "public.folder=data/emnist data.folder=data/mnist model.base=outputs/emnist/ldm",
}


def copy_of_the_project(folder: Path) -> Path:
    """A git and DVC repository of its own, with the experiments `celebahq-tiny` and `emnist-tiny`."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    weights = folder.parent / "weights.pt"
    inception = f"evaluation.inception_weights={weights} evaluation.inception_sha256={write_stand_in(weights)}"
    for name, folders in FOLDERS.items():
        scored = inception if name == "celebahq" else ""
        sections = asdict(tiny_config(f"{LITTLE} {folders} {scored}"))
        del sections["experiment"]["name"]
        (folder / f"configs/{name}-tiny.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "copy"]):
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        subprocess.run(["git", *identity, *command], cwd=folder, check=True)
    return folder


def public_pictures(folder: Path) -> None:
    def pictures():
        for index in range(12):
            image = np.random.default_rng(index).integers(0, 256, (16, 16, 1), dtype=np.uint8)
            yield Picture(f"{index}.png", "ABC"[index % 3], "train" if index < 9 else "test", encode_png(image))

    write_dataset(folder, pictures(), {"source": "test"}, 16, 1, packed=True)


def from_outside(project: Path, name: str) -> None:
    """What `prepare` would bring."""
    pipeline = PIPELINES[name]
    if pipeline.public:
        public_pictures(project / pipeline.public)
    tiny_dataset(project / str(pipeline.private))
    for folder in pipeline.folders:
        if folder is not None:
            write_json(project / folder / "source.json", {"origin": "test"})


def run(project: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{project}/mlflow.db"}
    environment |= {"DP_LORA_PYTHON": sys.executable, "DVC_NO_ANALYTICS": "1"}
    environment.pop("MLFLOW_RUN_ID", None)
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)


def status(project: Path) -> str:
    return subprocess.run(["git", "status", "--short"], cwd=project, capture_output=True, text=True, check=True).stdout


def main_makes_all_and_a_second_call_nothing(project: Path, name: str) -> None:
    pipeline, experiment = PIPELINES[name], f"{name}-tiny"
    made = run(project, "entrypoints.main", "--config", experiment)
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-3000:]
    assert "trainable parameters" in made.stdout
    for stage in ("count_params", "finetune/release", "samples", "evaluation"):
        assert (project / "outputs" / experiment / stage).is_dir()
    again = run(project, "entrypoints.main", "--config", experiment)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "nothing to do" in again.stdout
    assert "Running stage" not in again.stdout
    # the default pipeline, its parameters and its lock are as they were
    changed = {line[3:] for line in status(project).splitlines()}
    folder = str(Path(pipeline.file).parent)
    assert changed == {"data.dvc", f"{folder}/dvc.lock", f"{folder}/params.yaml"}


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


def plots_and_experiments_show(project: Path, name: str, experiment: str) -> None:
    plots = run(project, "dvc", "plots", "show", PIPELINES[name].file, "--out", "dvc_plots")
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
    lines = [line for line in stopped.stderr.splitlines() if line.startswith(f"{private}: missing; type `mlflow run")]
    assert len(lines) == 1
    assert f"`dvc pull {private}`" in lines[0]
    (project / "away").rename(project / private)


@pytest.mark.slow
def test_emnist_goes_from_prepared_pictures_to_scores_by_main_and_by_dvc_repro(tmp_path):
    project = copy_of_the_project(tmp_path / "project")
    stopped = run(project, "entrypoints.main", "--config", "emnist-tiny")
    assert stopped.returncode == 1
    assert stopped.stderr.startswith("error: data/emnist and data/mnist: missing; type `mlflow run . -b native")
    assert status(project) == ""

    from_outside(project, "emnist")
    main_makes_all_and_a_second_call_nothing(project, "emnist")
    bare_repro_reruns_finetune_and_what_follows(project, "emnist", "emnist-tiny")
    plots_and_experiments_show(project, "emnist", "emnist-tiny")
    missing_data_are_named(project, "emnist")


@pytest.mark.slow
def test_celebahq_goes_from_an_imported_base_to_scores(tmp_path):
    project = copy_of_the_project(tmp_path / "project")
    from_outside(project, "celebahq")
    # the importer has its own tests; here its output is a tiny model, committed as the stage's result
    make_base(project / "outputs/cin256/base", tiny_config())
    params = project / "pipelines/celebahq/params.yaml"
    params.write_text(params.read_text().replace("celebahq-eps10", "celebahq-tiny"))
    resolved = run(project, "dvc", "repro", "pipelines/celebahq/dvc.yaml:resolve")
    assert resolved.returncode == 0, resolved.stderr
    assert run(project, "dvc", "commit", "-f", "pipelines/celebahq/dvc.yaml:import_base").returncode == 0
    main_makes_all_and_a_second_call_nothing(project, "celebahq")
    bare_repro_reruns_finetune_and_what_follows(project, "celebahq", "celebahq-tiny")
    missing_data_are_named(project, "celebahq")
