"""The real command line: bad input gives one line and no trace, a dry run touches nothing, help comes at once."""

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from dp_lora.cli.common import Call
from dp_lora.cli.pipeline import read_params, write_params
from dp_lora.cli.pipelines import PIPELINES
from dp_lora.config import ROOT, STAGES, load
from dp_lora.data.layout import read_dataset
from dp_lora.errors import InputError
from dp_lora.tracking.metrics import number_text
from dp_lora.tracking.provenance import run_name
from tests.support.project_root import use_root


def call(entry_point: str, *arguments: str, store: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{store}/mlflow.db"}
    environment.pop("MLFLOW_RUN_ID", None)
    command = [sys.executable, "-m", f"entrypoints.{entry_point}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)


def invoke(entry_point: str, *arguments: str):
    import importlib

    return CliRunner().invoke(
        importlib.import_module(f"dp_lora.commands.{entry_point}").main, [str(word) for word in arguments]
    )


BAD = [
    ("--eps", "abc"), ("--eps", "-1"), ("--eps", "0"), ("--eps", "nan"), ("--rank", "0"), ("--delta", "0.00025"),
    ("--k", "0"), ("--config", "nope"), ("--config", "../x"), ("--config", "x; touch PWN"),
    ("--overrides", "train.foo=1"), ("--overrides", "train.lr=${oc.env:HOME}"),
]  # fmt: skip


@pytest.mark.parametrize(("option", "value"), BAD)
def test_bad_input_ends_in_one_line_and_makes_no_run(option, value, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    before = set(ROOT.iterdir())
    result = invoke("finetune", option, value)
    assert result.exit_code == 1
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert value.split("=")[0] in lines[0]
    assert set(ROOT.iterdir()) == before
    assert not list(tmp_path.iterdir())


def test_a_real_process_ends_in_one_line_too(tmp_path):
    result = call("finetune", "--config", "x; touch PWN", store=tmp_path)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines() == [
        "error: config='x; touch PWN': must be the name of an experiment in configs/, such as mnist5k"
    ]
    assert not (ROOT / "PWN").exists()
    assert not list(tmp_path.iterdir())


def test_a_dry_run_prints_the_plan_and_touches_nothing(tmp_path):
    before = set(ROOT.iterdir())
    result = call("finetune", "--eps", "5", "--dry-run", store=tmp_path)
    assert result.returncode == 0, result.stderr
    facts = dict(line.split(": ", 1) for line in result.stdout.splitlines() if ": " in line and line[0].isalpha())
    assert 4.9 < float(facts["expected epsilon"]) <= 5
    assert float(facts["noise_multiplier"]) > 1
    assert (facts["sample_rate"], facts["steps"], facts["trainable parameters"]) == ("0.1", "150", "9856")
    assert facts["would write"].split(", ")[-2:] == ["runs/RUN_ID/release", f"a run in sqlite:///{tmp_path}/mlflow.db"]
    assert facts["estimated DP-SGD"].startswith("150 steps of 400 rows, ")
    assert "computed, not measured" in facts["estimated on"]
    # what matters comes first: the facts, then the config
    _, _, config = result.stdout.partition("\n# its config, resolved:\n")
    resolved = yaml.safe_load(config)
    assert resolved["privacy"]["eps"] == 5
    assert set(ROOT.iterdir()) == before
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_while_tensors_are_written_ends_in_one_line(tmp_path):
    script = f"""
import resource
import torch
from pathlib import Path
from dp_lora.training.checkpoints import save_checkpoint
from dp_lora.cli.common import one_line_errors
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
with one_line_errors():
    save_checkpoint(Path({str(tmp_path)!r}), 1, 1, {{"a": torch.zeros(1000)}})
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"error: File too large: {tmp_path}/step-00000001.safetensors; make room")
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_not_there_cannot_be_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    result = invoke("finetune", "--overrides", f"train.resume={'a' * 32}")
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"error: train.resume={'a' * 32}: no such run")
    assert not list(tmp_path.iterdir())


def test_a_dry_run_without_privacy_promises_no_epsilon():
    result = invoke("finetune", "--eps", "inf", "--dry-run")
    assert result.exit_code == 0
    assert "expected epsilon" not in result.stdout
    assert "runs/RUN_ID/not-private" in result.stdout


@pytest.mark.parametrize("entry_point", STAGES)
def test_help_names_every_parameter_and_dry_run_needs_no_upstream(entry_point):
    result = invoke(entry_point, "--help")
    assert result.exit_code == 0
    for parameter in STAGES[entry_point].parameters:
        assert f"--{parameter} " in result.stdout
    assert "--resolved" not in result.stdout
    assert invoke(entry_point, "--dry-run").exit_code == 0


def test_a_dry_run_says_what_has_to_come_from_outside_first_and_writes_nothing_there():
    result = invoke("finetune", "--config", "celebahq-eps10", "--overrides", "compute.device=cpu", "--dry-run")
    facts = dict(line.split(": ", 1) for line in result.stdout.splitlines() if line.startswith(("first", "would")))
    assert facts["first"].startswith("data/cin256 and data/celebahq: missing; type `.venv/bin/mlflow run ")
    assert "outputs/cin256/base" in facts["would write"].split(", ")
    assert " data/" not in facts["would write"]


def test_an_adapter_or_samples_that_are_not_there_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    for entry_point, option in (("sample", "--adapter"), ("export", "--adapter"), ("fid", "--samples")):
        for value in ("no/such/folder", "0" * 32):
            for dry_run in ([], ["--dry-run"]):
                result = invoke(entry_point, option, value, *dry_run)
                assert result.exit_code == 1
                assert value in result.stderr
                assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (["sample", "--adaptr", "1"], "error: No such option '--adaptr'; did you mean --adapter?; --help lists"),
        (["sample", "--resolve", "1"], "error: No such option '--resolve'; --help"),  # no hint at a hidden option
        (["sample", "--foo", "1"], "error: No such option '--foo'; --help lists the options"),
        (
            ["finetune", "--train_data_dir", "x"],
            "error: No such option '--train_data_dir'; did you mean data.path?",
        ),
        (["reproduce"], "error: Missing argument 'RUN_ID'; --help lists the options"),
        (["upload", "--foo"], "error: No such option '--foo'; --help lists the options"),
        (["ui", "--port", "70000"], "error: Invalid value for '--port': 70000 is not in the range 1<=x<=65535;"),
    ],
)
def test_a_usage_error_is_one_line(command, line):
    result = invoke(*command)
    assert result.exit_code == 2
    assert result.output.startswith(line)
    assert len(result.output.splitlines()) == 1


def test_a_folder_of_one_s_own_whose_public_statements_are_overrides_is_prepared(tmp_path, monkeypatch):
    use_root(tmp_path, monkeypatch)  # the contact sheet, too, lies below it
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(8):
            Image.new("L", (20, 20), 10 * number).save(tmp_path / "pictures" / name / f"{number}.png")
    own = f"data.path={tmp_path}/pictures data.classes=[cat,dog] data.n_public=2000"
    result = invoke("prepare", "--config", "folder", "--overrides", own, "--part", "private", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert len(read_dataset(tmp_path / "out", ["cat", "dog"], "train")) > 0


def test_a_command_of_one_clone_is_refused_in_another(tmp_path):
    (tmp_path / "dp_lora").mkdir()
    (tmp_path / "MLproject").touch()
    command = [Path(sys.executable).with_name("dp-lora"), "prepare"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path}: another clone than this command's, ")
    assert {path.name for path in tmp_path.iterdir()} == {"dp_lora", "MLproject"}


def test_params_yaml_is_written_and_read_back(tmp_path):
    pipeline = replace(PIPELINES["letters"], file=str(tmp_path / "dvc.yaml"))
    for values in (
        {"config": "mnist5k"},
        {"config": "mnist5k", "eps": "5", "overrides": "train.lr=1 data.classes=[a,b]"},
    ):
        write_params(pipeline, values)
        assert read_params(pipeline) == values
    for text, wrong in (("config: a\nfoo: 1\n", "foo"), ("eps: 1\n", "config"), ("- a\n", "config")):
        pipeline.params.write_text(text)
        with pytest.raises(InputError, match=wrong):
            read_params(pipeline)


@pytest.mark.parametrize("entry_point", ["main", "finetune"])
def test_what_prepare_has_to_bring_is_named_before_anything_starts(entry_point, tmp_path, monkeypatch):
    assert not (ROOT / "data" / "celebahq").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    before = PIPELINES["celebahq"].params.read_bytes()
    result = invoke(entry_point, "--config", "celebahq-eps10", "--overrides", "compute.device=cpu")
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert "data/celebahq: missing; type `.venv/bin/mlflow run . -b native -e prepare -P config=celebahq-eps10`" in line
    assert "dvc pull" in line
    assert PIPELINES["celebahq"].params.read_bytes() == before
    assert not list(tmp_path.iterdir())


def test_main_says_which_pipeline_a_config_belongs_to():
    for config, file in (("mnist5k", "dvc.yaml"), ("celebahq-eps10", "pipelines/celebahq/dvc.yaml")):
        result = invoke("main", "--dry-run", "--config", config, "--overrides", "compute.device=cpu")
        assert result.exit_code == 0
        assert f"pipeline: {file}\n" in result.stdout
        for part in ("latents", "DP-SGD", "grids", "samples", "on"):
            assert result.stdout.count(f"\nestimated {part}: ") == 1


def test_a_stage_that_the_pipeline_lacks_is_refused_in_one_line():
    for entry_point in ("pretrain_ae", "pretrain_ldm"):
        result = invoke(entry_point, "--config", "celebahq-eps10", "--overrides", "compute.device=cpu")
        assert result.exit_code == 1
        assert "its base is imported from data/cin256" in result.stderr


@pytest.mark.parametrize(
    ("statement", "eps"),
    [
        ({"private": True, "accounting": "per_unit", "target_epsilon": 5.0, "k": 3, "delta": 1e-6}, 5.0),
        ({"private": False, "k": 3}, math.inf),
        ({"private": False, "accounting": "published", "k": 3, "claimed_epsilon": 10.0}, 10.0),
    ],
)
def test_a_run_on_an_adapter_carries_the_adapter_s_privacy_and_rank_whatever_the_config_says(statement, eps):
    call = Call("sample", load("mnist5k"), None, dry_run=False, inputs={"adapter": "runs/x/release"})
    of_adapter = call.of_adapter(statement, 8)
    privacy, lora = of_adapter.config.privacy, of_adapter.config.lora
    assert (privacy.eps, privacy.k, lora.rank) == (eps, 3, 8)
    assert privacy.delta == statement.get("delta", call.config.privacy.delta)
    assert run_name("sample", of_adapter.config).startswith(f"mnist5k eps={number_text(eps)} r=8 k=3")
    # the command that repeats the run is the one that was typed
    assert of_adapter.repeat.endswith("-e sample -P config=mnist5k -P adapter=runs/x/release")


def test_a_dry_run_of_count_params_prints_the_counts_and_refuses_a_target_that_matches_nothing():
    done = invoke("count_params", "--dry-run", "--rank", 2)
    assert done.exit_code == 0, done.output
    counts = dict(
        line.split(": ", 1) for line in done.stdout.splitlines() if re.match(r"(total|trainable|lora): ", line)
    )
    total, trainable, lora = (int(counts[name].replace(",", "")) for name in ("total", "trainable", "lora"))
    assert total > trainable > 0
    assert lora == 8960  # half the number at rank 4
    assert "would write: runs/RUN_ID/count_params.json" in done.stdout
    assert invoke("count_params", "--dry-run", "--overrides", "lora.targets=foo.bar").exit_code != 0
