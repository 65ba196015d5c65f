"""`make reproduce` for real: it makes whole chains of a tiny experiment again from MLflow's record alone."""

import os
import subprocess
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.support.prepare_call import commit_all
from tests.support.tiny_project import EXPERIMENT, run, tiny_project

pytestmark = pytest.mark.slow

REPLAY = "privacy.reproducible=true privacy.seed_file=seed"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The tiny project with its experiment committed, and the operator's seed file."""
    folder = tiny_project(tmp_path / "project")
    commit_all(folder)
    (folder / "seed").write_bytes(os.urandom(32))
    (folder / "seed").chmod(0o600)
    return folder


def make(project: Path, entry_point: str, overrides: str, *arguments: str) -> Run:
    """Run an entry point and find its MLflow run."""
    done = run(project, f"entrypoints.{entry_point}", "--config", EXPERIMENT, "--overrides", overrides, *arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    newest = ["attributes.start_time DESC"]
    return client.search_runs(experiments, f"tags.stage = '{entry_point}'", max_results=1, order_by=newest)[0]


def again(project: Path, made: Run) -> subprocess.CompletedProcess[str]:
    return run(project, "dp_lora", "reproduce", made.info.run_id)


def test_a_whole_main_in_the_reproducible_mode_comes_out_equal_file_by_file(project):
    made = make(project, "main", REPLAY)
    done = again(project, made)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.endswith(f"{made.info.run_id}: equal\n")
    for file in ("finetune/release/pytorch_lora_weights.safetensors", "samples/samples.npz", "evaluation/"):
        assert f"{file}: equal" in done.stdout
    assert not (project / "runs/reproduce" / made.info.run_id).exists()

    # the comparison uses the digests that the run recorded, not the files that lie there now
    grid = project / "outputs" / EXPERIMENT / "samples/grid.png"
    grid.write_bytes(grid.read_bytes() + b" ")
    changed = again(project, made)
    assert changed.returncode == 0, changed.stdout + changed.stderr[-3000:]


def test_of_a_run_with_fresh_noise_all_upstream_of_it_is_made_again_and_the_noise_is_not(project):
    made = make(project, "main", "")
    done = again(project, made)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "main: fresh noise: not made again, it would spend privacy once more" in done.stdout
    assert not list((project / "runs").glob("reproduce/*"))


def test_a_replay_that_goes_on_from_an_earlier_fine_tuning_comes_out_equal_with_the_sum_of_both(project):
    first = make(project, "finetune", REPLAY)
    second = make(project, "finetune", f"{REPLAY} privacy.parent={first.info.run_id}", "--eps", "2")
    assert second.data.metrics["epsilon"] > first.data.metrics["epsilon"]
    done = again(project, second)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.endswith(f"{second.info.run_id}: equal\n")


def test_a_run_of_a_commit_with_other_packages_is_made_again_in_an_environment_of_that_commit_s_lock(project):
    made = make(project, "pretrain_ae", "")
    lock = project / "requirements.lock"
    lock.write_text(lock.read_text() + "# a later lock\n")
    done = again(project, made)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert (project / "requirements.lock").read_text().endswith("# a later lock\n")


def test_private_pictures_are_prepared_again_and_compared_by_their_keyed_digest(project):
    make(project, "prepare", "")
    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (made,) = client.search_runs(experiments, f"tags.output = 'outputs/{EXPERIMENT}/data'")
    done = again(project, made)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "prepare: ./: equal" in done.stdout
    # another key belongs to another operator, who can compare nothing that the run keeps
    (project / "runs/.key").write_bytes(os.urandom(32))
    other = again(project, made)
    assert other.returncode == 1
    assert "prepare: ./: different" in other.stdout
