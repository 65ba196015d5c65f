"""Registered models: the entry point `finetune` makes them, MLflow's client reads them back, and they load and draw."""

import ast
import importlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import packages_distributions
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlparse

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from dp_lora import tracking
from dp_lora.config import ROOT, load, write_resolved
from dp_lora.data.layout import read_dataset
from dp_lora.errors import InputError
from dp_lora.files import read_json
from dp_lora.models.adapters import apply_adapter
from dp_lora.models.folder import load_model
from dp_lora.sampling import draw
from dp_lora.tracking import registry
from dp_lora.tracking.description import NOTE
from tests.support.project_root import use_root
from tests.support.tiny import TINY, make_base, make_release, tiny_config, tiny_dataset
from tests.support.tracking_server import free_port
from tests.support.tracking_store import use_store

NAME = "dp-lora-mnist5k"
KINDS = {".safetensors", ".json", ".yaml", ".txt", ".md", ".py"}
LOAD = """
import json, sys
import mlflow, numpy, pandas
model = mlflow.pyfunc.load_model("models:/dp-lora-mnist5k@eps5")
numpy.save("drawn.npy", model.predict(pandas.DataFrame({"class": ["y", "x", "y"]}), params={"n": 2, "seed": 7}))
numpy.save("one.npy", model.predict({"class": ["y"]}))
json.dump({name: module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "dp_lora"},
          open("modules.json", "w"))
"""


def model_of(client, version):
    """The logged model that a version names as its source."""
    return client.get_logged_model(version.source.removeprefix("models:/"))


def folder_of(client, version) -> Path:
    """The folder in which the local store keeps a version's model."""
    return Path(urlparse(model_of(client, version).artifact_location).path)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A project root with a tiny base, private pictures and a fine-tuning, made as a DVC stage of `main`."""
    root = tmp_path_factory.mktemp("house")
    with pytest.MonkeyPatch.context() as patch:
        client = use_root(root, patch)
        make_base(root / "base", tiny_config())
        # neither file belongs to the model
        (root / "base/notes.pkl").write_bytes(b"\x80\x04N.")
        (root / "base/samples.png").write_bytes(b"")
        tiny_dataset(root / "outputs/mnist5k/data")
        config = load("mnist5k", {"eps": "5"}, f"{TINY} model.base=base")
        write_resolved(config, root / "resolved.yaml")
        with tracking.run("main", config) as parent, patch.context() as inner:
            inner.setenv("MLFLOW_RUN_ID", parent.run_id)
            called("--resolved", root / "resolved.yaml", "--out", root / "outputs/mnist5k/finetune")
        release = root / "outputs/mnist5k/finetune/release"
        made = client.get_model_version_by_alias(NAME, "eps5")
        yield SimpleNamespace(root=root, client=client, config=config, release=release, base=root / "base", made=made)


def called(*arguments):
    """Call `finetune` with these arguments; it must succeed."""
    main = importlib.import_module("dp_lora.commands.finetune").main
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def test_a_stage_of_main_registers_its_release_with_alias_facts_and_card(house):
    statement = read_json(house.release / "privacy.json")
    facts = {
        "epsilon": repr(statement["epsilon"]),
        "delta": "0.001",
        "neighbouring_relation": "add-or-remove-one",
        "unit_of_privacy": "picture",
        "rank": "2",
        "k": "1",
    }
    logged = model_of(house.client, house.made)
    assert 0 < float(facts["epsilon"]) <= 5
    assert logged.params == facts
    assert house.made.tags == {**facts, "run_id_of_adapter": statement["run_id"], "base": "base"}
    assert str(logged.status) == "READY"
    card = (house.release / "README.md").read_text()
    assert house.made.description.startswith("# DP-LoRA adapter: mnist5k\n")
    assert card.strip().endswith(house.made.description)
    assert f'"models:/{NAME}@eps5"' in house.client.get_registered_model(NAME).description
    run = house.client.get_run(house.made.run_id)
    assert run.data.tags["stage"] == "finetune"
    assert "mlflow.parentRunId" in run.data.tags
    assert run.data.tags["model"] == f"models:/{NAME}/{house.made.version}"
    assert f"(#/models/{NAME}/versions/{house.made.version}?" in run.data.tags[NOTE]
    assert [output.model_id for output in run.outputs.model_outputs] == [logged.model_id]


@pytest.mark.slow
def test_loaded_by_alias_in_another_process_it_draws_what_the_sampler_draws(house, tmp_path):
    result = subprocess.run([sys.executable, "-c", LOAD], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    model = apply_adapter(load_model(house.base), house.release)
    arguments = (house.config.sampling, 7, torch.device("cpu"))
    expected = draw(model, [1, 1, 0, 0, 1, 1], [0, 1, 0, 1, 2, 3], *arguments)
    drawn, one = np.load(tmp_path / "drawn.npy"), np.load(tmp_path / "one.npy")
    assert drawn.shape == (6, 16, 16, 1)
    assert np.abs(drawn.astype(int) - expected).max() <= 1
    assert np.abs(drawn[0].astype(int) - drawn[1]).max() > 1
    defaults = draw(model, [1], [0], house.config.sampling, house.config.experiment.seed, arguments[-1])
    assert np.abs(one.astype(int) - defaults).max() <= 1

    folder = folder_of(house.client, house.made)
    modules = {name: Path(file) for name, file in json.loads((tmp_path / "modules.json").read_text()).items() if file}
    assert "dp_lora.sampling.ddim" in modules
    assert all(path.is_relative_to(folder / "code") for path in modules.values())
    # its requirements name every package that this code imports
    required = {line.partition("==")[0].lower() for line in (folder / "requirements.txt").read_text().splitlines()}
    distributions = packages_distributions()
    for path in [*modules.values(), folder / "served_model.py"]:
        for package in imported(path) - sys.stdlib_module_names - {"dp_lora"}:
            assert {name.lower() for name in distributions[package]} & required, f"{path}: {package}"


def imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {name.split(".")[0] for name in names}


def test_the_folder_holds_no_pickle_and_no_path_of_this_machine(house):
    folder = folder_of(house.client, house.made)
    # loading the model leaves these beside it
    left = {"__pycache__", "registered_model_meta"}
    files = [path for path in folder.rglob("*") if path.is_file() and not left & set(path.parts)]
    assert {path.relative_to(folder).parts[0] for path in files} == {
        "MLmodel", "artifacts", "code", "conda.yaml", "python_env.yaml", "requirements.txt", "served_model.py",
    }  # fmt: skip
    assert {path.suffix for path in files if path.name != "MLmodel"} <= KINDS
    for path in files:
        start = path.read_bytes()[:2]
        assert not start.startswith((b"\x80", b"PK")), path
        if path.suffix not in (".py", ".safetensors"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(rf"{re.escape(str(house.root))}|{re.escape(str(ROOT))}|/tmp|/home|file:", text), path


def test_nothing_that_stays_with_the_operator_enters_the_model(house):
    digest = read_dataset(house.root / "outputs/mnist5k/data", ["x", "y"], "train").digest()
    run = house.client.get_run(house.made.run_id)
    assert digest not in [tag.value for entry in run.inputs.dataset_inputs for tag in entry.tags]
    assert any(name.startswith("private/") for name in run.data.metrics)
    secrets = [digest[:36], next(house.root.glob("runs/*/ledger.jsonl")).parent.name, "private/loss"]
    logged = model_of(house.client, house.made)
    assert not logged.metrics
    said = json.dumps([logged.params, logged.tags, house.made.tags, house.made.description])
    folder = folder_of(house.client, house.made)
    # code/ holds this package, which is public
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_relative_to(folder / "code")]
    assert files
    for secret in secrets:
        assert secret not in said
        for path in files:
            assert secret.encode() not in path.read_bytes(), path


def test_one_release_is_one_version_however_often_its_fine_tuning_is_called(house):
    call = ("--eps", "5", "--overrides", f"{TINY} model.base=base")
    again = called(*call)
    assert f"registered: models:/{NAME}@eps5, version {house.made.version}" in again.stderr
    same = f"name = '{NAME}' and tags.run_id_of_adapter = '{house.made.tags['run_id_of_adapter']}'"
    assert [version.version for version in house.client.search_model_versions(same)] == [house.made.version]


@pytest.mark.slow
def test_an_adapter_without_a_guarantee_is_not_registered(house):
    before = len(house.client.search_model_versions(f"name = '{NAME}'"))
    models = len(house.client.search_logged_models([house.client.get_run(house.made.run_id).info.experiment_id]))
    for change in ("privacy.eps=inf", "privacy.accounting=published"):
        result = called("--overrides", f"{TINY} model.base=base {change}")
        assert "not-private" in result.stdout
        assert "registered" not in result.stderr
    assert len(house.client.search_model_versions(f"name = '{NAME}'")) == before
    assert (
        len(house.client.search_logged_models([house.client.get_run(house.made.run_id).info.experiment_id])) == models
    )


@pytest.fixture
def released(tmp_path):
    """A base and a release that no fine-tuning of `house` made."""
    make_base(tmp_path / "base", tiny_config())
    return make_release(tmp_path / "base", tmp_path / "release"), tmp_path / "base"


def test_the_alias_moves_to_the_newer_release_the_older_stays_and_one_line_is_said_of_each(
    released, tmp_path, monkeypatch, capfd, recwarn
):
    client, config = use_store(tmp_path, monkeypatch), tiny_config()
    release, base = released
    capfd.readouterr()  # drop the messages of a new store
    versions = []
    for run_id in ("a" * 32, "b" * 32):
        statement = read_json(release / "privacy.json") | {"run_id": run_id}
        (release / "privacy.json").write_text(json.dumps(statement))
        with tracking.run("finetune", config) as run:
            run.register(config, release, base)
        versions.append(client.get_model_version_by_alias(NAME, "eps8"))
    assert [version.tags["run_id_of_adapter"][0] for version in versions] == ["a", "b"]
    assert len(client.search_model_versions(f"name = '{NAME}'")) == 2
    said = capfd.readouterr()
    assert said.err.splitlines() == [f"registered: models:/{NAME}@eps8, version {number}" for number in (1, 2)]
    assert not said.out
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]


@pytest.mark.parametrize(
    ("eps", "alias"), [(5, "eps5"), (0.5, "eps0_5"), (10.0, "eps10"), (1e-05, "eps1e-05"), (1e6, "eps1e_06")]
)
def test_every_target_epsilon_has_an_alias_that_mlflow_takes(eps, alias, house):
    assert registry.alias_of(eps) == alias
    house.client.set_registered_model_alias(NAME, f"{alias}-test", house.made.version)
    assert house.client.get_model_version_by_alias(NAME, f"{alias}-test").version == house.made.version


def test_a_store_that_cannot_take_the_model_is_one_line_and_the_run_is_finished(
    released, tmp_path, monkeypatch, capsys
):
    client, config = use_store(tmp_path, monkeypatch), tiny_config()
    (tmp_path / "mlartifacts").mkdir()
    (tmp_path / "mlartifacts/models").write_text("no folder can be made here")
    with tracking.run("finetune", config) as run:
        run.register(config, *released)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "regist" in line]
    assert line.startswith("not registered as a model (")
    done = client.get_run(run.run_id)
    assert done.info.status == "FINISHED"
    assert "model" not in done.data.tags
    (logged,) = client.search_logged_models([run.experiment_id])
    assert str(logged.status) == "FAILED"
    assert client.search_model_versions(f"name = '{NAME}'") == []


def test_a_large_base_is_not_copied_but_named_and_checked(released, tmp_path, monkeypatch):
    import mlflow
    import pandas

    release, base = released
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(registry, "COPIED_UP_TO", 10_000)
    registry.write_model(tmp_path / "model", tiny_config(), release, base, "0" * 32, "m-0")
    assert [path.name for path in (tmp_path / "model/artifacts").iterdir()] == ["release"]
    loaded = mlflow.pyfunc.load_model(str(tmp_path / "model"), model_config={"base": str(base)})
    assert loaded.predict(pandas.DataFrame({"class": ["x"]})).shape == (1, 16, 16, 1)
    torch.manual_seed(1)
    make_base(tmp_path / "other", tiny_config("ldm.norm_num_groups=2"))
    for wrong in ("other", "nowhere"):
        with pytest.raises(InputError, match=r"model_config={'base': FOLDER}"):
            mlflow.pyfunc.load_model(str(tmp_path / "model"), model_config={"base": str(tmp_path / wrong)})


def test_a_served_model_draws_with_every_setting_of_the_experiment(released, tmp_path, monkeypatch):
    import mlflow
    import pandas

    monkeypatch.setattr(sys, "path", list(sys.path))
    config = tiny_config("sampling.precision=bfloat16 sampling.eta=0.5 sampling.steps=4")
    registry.write_model(tmp_path / "model", config, *released, "0" * 32, "m-0")
    loaded = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    seen = []

    def drawn(model, labels, indices, sampling, seed, device):
        seen.append(sampling)
        return draw(model, labels, indices, sampling, seed, device)

    monkeypatch.setattr("dp_lora.sampling.ddim.draw", drawn)
    loaded.predict(pandas.DataFrame({"class": ["x"]}), params={"n": 3})
    assert seen == [replace(config.sampling, n=3)]


@pytest.mark.parametrize(
    ("given", "params", "words"),
    [(["z"], {}, "'z' is unknown; the model knows x, y"), ([], {}, "0 rows"), (["x"], {"n": 0}, "0 images"),
     (["x"], {"steps": 2000}, "sampling.steps=2000")],
)  # fmt: skip
def test_what_cannot_be_drawn_is_said(house, monkeypatch, given, params, words):
    import mlflow
    import pandas

    monkeypatch.setattr(sys, "path", list(sys.path))
    loaded = mlflow.pyfunc.load_model(str(folder_of(house.client, house.made)))
    with pytest.raises(mlflow.exceptions.MlflowException, match=words):
        loaded.predict(pandas.DataFrame({"class": given}, dtype=str), params=params)


@pytest.mark.slow
def test_a_release_is_registered_and_loaded_through_a_server(released, tmp_path, monkeypatch):
    import mlflow
    import pandas

    from dp_lora.commands import ui

    use_store(tmp_path, monkeypatch)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(ui, "LOG", tmp_path / "ui.log")
    with ui.server(free_port()) as (address, _):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        with tracking.run("finetune", tiny_config()) as run:
            run.register(tiny_config(), *released)
        loaded = mlflow.pyfunc.load_model(f"models:/{NAME}@eps8")
        assert loaded.predict(pandas.DataFrame({"class": ["x", "y"]})).shape == (2, 16, 16, 1)
        assert loaded.metadata.run_id == run.run_id
