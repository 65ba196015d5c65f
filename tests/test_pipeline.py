"""The DVC pipeline: what a parameter reruns, and that every key of the config is somebody's dependency."""

import re

import pytest
import yaml

from dp_lora.config import ROOT, flatten, load
from dp_lora.errors import InputError

PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
# what no result depends on: names, what `prepare` downloads (DVC knows data/ by its hash), portions of the work
NOT_RESULTS = ("experiment.name", "experiment.description", "huggingface.", "checkpoint.", "compute.")


def keys_of(stage: str) -> list[str]:
    """Sections or keys of the resolved config that a stage lists under params."""
    listed = PIPELINE["stages"][stage].get("params", [])
    return [key for item in listed if isinstance(item, dict) for key in item["outputs/resolved.yaml"]]


def depends(stage: str, leaf: str) -> bool:
    return any(leaf == key or leaf.startswith(f"{key}.") for key in keys_of(stage))


def stages_of(leaf: str) -> set[str]:
    return {stage for stage in PIPELINE["stages"] if depends(stage, leaf)}


@pytest.mark.parametrize("parameter", ["eps", "delta", "k", "max_grad_norm", "batch_size", "epochs", "lr"])
def test_a_privacy_parameter_reruns_finetune_and_nothing_before(parameter):
    values = {"eps": "1", "delta": "1e-6", "k": "2", "max_grad_norm": "0.1", "batch_size": "200"}
    values |= {"epochs": "5", "lr": "0.01"}
    before, after = flatten(load("mnist5k")), flatten(load("mnist5k", {parameter: values[parameter]}))
    changed = [key for key in before if before[key] != after[key]]
    assert len(changed) == 1
    assert stages_of(changed[0]) == {"finetune"}


def test_every_leaf_of_the_config_is_a_dependency_of_some_stage():
    for leaf in flatten(load("mnist5k")):
        if not leaf.startswith(NOT_RESULTS):
            assert stages_of(leaf), leaf


def test_every_listed_key_exists():
    leaves = set(flatten(load("mnist5k")))
    for stage in PIPELINE["stages"]:
        for key in keys_of(stage):
            assert any(leaf == key or leaf.startswith(f"{key}.") for leaf in leaves), f"{stage}: {key}"


def test_plan_ledger_and_checkpoints_lie_outside_every_output():
    outs = [out for stage in PIPELINE["stages"].values() for out in stage["outs"]]
    assert outs
    assert all(out.startswith("outputs/") for out in outs)


def test_every_stage_runs_an_entry_point_that_exists_without_a_shell_s_help():
    for name, stage in PIPELINE["stages"].items():
        words = stage["cmd"].split()
        assert words[0] == "entrypoints/run"
        assert (ROOT / "entrypoints" / f"{words[1]}.py").exists(), name
        assert not re.search(r"[;&|<>`]|\$\(", stage["cmd"])


def test_every_dependency_on_code_exists():
    for stage in PIPELINE["stages"].values():
        for dependency in stage.get("deps", []):
            if not dependency.startswith("outputs/"):
                assert (ROOT / dependency).exists(), dependency


def test_what_is_missing_below_data_names_the_two_commands_that_bring_it(tmp_path, monkeypatch):
    from entrypoints import common, pipeline

    for module in (common, pipeline):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    config = load("celebahq")
    with pytest.raises(InputError) as error:
        pipeline.make_missing(config, {}, {}, pipeline.private_data(config))
    line = str(error.value)
    assert line.startswith("data/celebahq missing: ")
    assert "python -m entrypoints.prepare --config celebahq" in line
    assert "dvc pull data/celebahq" in line
