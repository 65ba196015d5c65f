"""The real command line: a killed MLflow run resumes by its id, and a second fine-tuning states the cost of both."""

import subprocess
import sys
import time

import pytest
from mlflow import MlflowClient

from dp_lora.files import read_json
from tests.support.tiny import make_base, tiny_config, tiny_dataset
from tests.support.tiny_project import EXPERIMENT, clean_environment, tiny_project
from tests.support.tiny_project import run as command

SETTINGS = (
    "data.classes=[x,y] data.n_public=40 privacy.batch_size=8 privacy.epochs=4 train.checkpoint_every=2 "
    "train.grid_every=0"
)


def finetune(project, overrides="", **environment):
    environment = {"OMP_NUM_THREADS": "1", **environment}
    words = ("--config", EXPERIMENT, "--overrides", f"{SETTINGS} {overrides}")
    return command(project, "entrypoints.finetune", *words, **environment)


def refusal(done):
    assert done.returncode == 1, done.stderr[-2000:]
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


@pytest.mark.slow
def test_a_killed_run_goes_on_by_its_id_and_a_second_fine_tuning_adds_it_up(tmp_path):
    project = tiny_project(tmp_path / "project")
    make_base(project / "outputs/letters/ldm", tiny_config())
    tiny_dataset(project / f"outputs/{EXPERIMENT}/data")
    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    first = client.create_run(client.create_experiment("dp-lora", str(project / "mlartifacts"))).info.run_id

    # start it as `mlflow run` does, with its own run and working folder; kill it after some steps
    words = ["-m", "entrypoints.finetune", "--config", EXPERIMENT, "--overrides", SETTINGS]
    environment = {**clean_environment(), "MLFLOW_RUN_ID": first, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, *words], cwd=project, env=environment, stdout=log, stderr=log)
    ledger = project / "runs" / first / "ledger.jsonl"
    while not ledger.exists() or len(ledger.read_bytes().splitlines()) < 3:
        assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
        time.sleep(0.02)
    process.kill()
    process.wait()
    lines = ledger.read_bytes()

    (line,) = refusal(finetune(project, f"train.resume={first} train.lr=0.01"))
    assert "with other train.lr; a ledger holds one plan" in line
    assert ledger.read_bytes() == lines
    done = finetune(project, f"train.resume={first}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert ledger.read_bytes().startswith(lines)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()], "attributes.status = 'FINISHED'")
    (second,) = [run.info.run_id for run in runs]
    release = project / "runs" / second / "release"
    statement = read_json(release / "privacy.json")
    assert lines.count(b"\n") < statement["steps"] <= 20
    assert statement["epsilon"] <= 10
    points = (project / "runs" / second / "epsilon_of_delta.csv").read_text().splitlines()
    assert points[0] == "delta,epsilon"
    assert len(points) > 12
    assert "epsilon_of_delta.csv" in [file.path for file in client.list_artifacts(second)]

    # the sum counts the parent, given by its run id; a parent on other data counts too, and is named
    done = finetune(project, f"privacy.parent={second} experiment.seed=1")
    assert done.returncode == 0, done.stderr[-2000:]
    # look in the run's output, not in the working folder, which holds the same release
    (curve_file,) = [path for path in project.glob("runs/*/epsilon_of_delta.csv") if path.parent.name != second]
    both = curve_file.parent / "release" / "privacy.json"
    sums = read_json(both)
    assert len(sums["parts"]) == 2
    assert sums["epsilon"] == pytest.approx(statement["epsilon"] + sums["accountants"]["epsilon"])
    curve = [line.split(",") for line in curve_file.read_text().splitlines()[1:]]
    assert min(float(delta) for delta, _ in curve) == pytest.approx(statement["delta"] + 1e-10)
    assert min(float(epsilon) for _, epsilon in curve) > statement["epsilon"]
    assert sums["delta"] == 2 * statement["delta"]
    assert f"run {statement['run_id']}: epsilon" in (both.parent / "README.md").read_text()
    tiny_dataset(project / f"outputs/{EXPERIMENT}/data", n=42)
    done = finetune(project, f"privacy.parent={second}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "privacy.parent: was begun on other private data, and is added all the same: " in done.stderr
