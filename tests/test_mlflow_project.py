"""The project as users run it: `mlflow run . -b native` in this environment; the tests read back states and numbers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dp_lora.config import ROOT, flatten, load


def mlflow_run(store: Path, entry_point: str, *parameters: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{store}/mlflow.db"}
    environment.pop("MLFLOW_RUN_ID", None)
    values = [word for parameter in parameters for word in ("-P", parameter)]
    command = [str(Path(sys.executable).with_name("mlflow")), "run", ".", "-b", "native", "-e", entry_point, *values]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240)


def only_run(store: Path):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{store}/mlflow.db")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return run


def test_count_params_by_mlflow_run_logs_figures_params_and_its_output_folder(tmp_path):
    result = mlflow_run(tmp_path, "count_params", "rank=8")
    assert result.returncode == 0, result.stderr[-2000:]
    run = only_run(tmp_path)
    try:
        assert run.info.status == "FINISHED"
        assert run.data.params["rank"] == "8"
        assert run.data.params["lora.rank"] == "8"
        assert set(flatten(load("mnist5k"))) <= set(run.data.params)
        assert run.data.metrics["trainable"] == run.data.metrics["lora_trained"] + run.data.metrics["class_embedding"]
        assert any(name.startswith("lora_per_kind.") for name in run.data.metrics)
        # MLflow makes a section of the words before a /, and would open the chart page there
        assert not any("/" in name for name in run.data.metrics)
        assert (ROOT / run.data.tags["output"] / "count_params.json").exists()
    finally:
        shutil.rmtree(ROOT / "runs" / run.info.run_id, ignore_errors=True)


@pytest.mark.parametrize("parameter", ["config=x; touch PWN", pytest.param("eps=abc", marks=pytest.mark.slow)])
def test_bad_input_under_mlflow_run_fails_the_run_in_one_line_and_executes_nothing(tmp_path, parameter):
    before = set(ROOT.iterdir())
    result = mlflow_run(tmp_path, "finetune", parameter)
    assert result.returncode != 0
    run = only_run(tmp_path)
    assert run.info.status == "FAILED"
    value = parameter.partition("=")[2]
    assert value in run.data.tags["error"]
    assert "\n" not in run.data.tags["error"]
    assert set(ROOT.iterdir()) == before
    assert not (ROOT / "PWN").exists()
