"""The description that the UI shows above a run, and the links between runs, read through MLflow's own client."""

import re
import shlex

import pytest
from PIL import Image

from dp_lora import tracking
from dp_lora.cli.common import repeat_command
from dp_lora.config import load
from dp_lora.tracking.description import NOTE, Description, Upstream
from tests.support.tracking_store import use_store

PRIVATE = {
    "private": True,
    "epsilon": 4.99912,
    "delta": 1e-05,
    "unit": "picture",
    "relation": "add-or-remove-one",
    "statement": "",
}


@pytest.fixture
def client(tmp_path, monkeypatch):
    return use_store(tmp_path, monkeypatch)


def test_a_description_says_what_it_is_how_to_repeat_it_its_privacy_and_what_it_was_made_from():
    shown = Description("sample", "About digits.", "mlflow run . -e sample", "a" * 40, True, PRIVATE)
    shown.upstream.append(Upstream("adapter", "f" * 32, "1", "mnist5k eps=5 r=4 k=1"))
    text = shown.markdown()
    first, _, rest = text.partition("\n\n")
    assert "\n" not in first
    assert first.startswith("**Privacy:** epsilon 4.99912, delta 1e-05. ")
    assert "Unit of privacy: one picture. Neighbouring relation: add-or-remove-one." in first
    assert rest.startswith("DDIM samples of the fine-tuned model. About digits.\n")
    assert "```sh\nmlflow run . -e sample\n```" in text
    assert f"commit `{'a' * 12}`, with changes that were not committed" in text
    assert f"- adapter: [mnist5k eps=5 r=4 k=1](#/experiments/1/runs/{'f' * 32}?workflowType=machine_learning)" in text


def test_a_description_of_a_run_without_privacy_shows_no_epsilon():
    text = Description("finetune", "", "x", privacy={"private": False, "statement": "no bound holds"}).markdown()
    assert text.startswith("**Privacy:** no bound holds.\n")
    assert "epsilon" not in text


@pytest.mark.parametrize(
    ("stage", "parameters", "overrides"),
    [
        ("finetune", {"eps": "5", "rank": "8", "seed": "3"}, "train.betas=[0.5,0.9] data.path=null"),
        ("pretrain_ldm", {"epochs": "2"}, "ldm.ema_decay=0.5"),
        ("sample", {"seed": "3"}, "sampling.n=7"),
    ],
)
def test_the_command_in_the_description_resolves_to_the_very_config(stage, parameters, overrides):
    config = load("mnist5k", parameters, overrides, stage=stage)
    words = shlex.split(repeat_command(stage, config, {"adapter": "runs/a b"}))
    assert words[:7] == [".venv/bin/mlflow", "run", ".", "-b", "native", "-e", stage]
    assert set(words[7::2]) == {"-P"}
    typed = dict(word.split("=", 1) for word in words[8::2])
    assert typed.pop("adapter") == "runs/a b"
    assert load(typed.pop("config"), typed, typed.pop("overrides", ""), stage=stage) == config
    assert {word.split("=", 1)[0] for word in words[8::2]} >= set(parameters)


def test_samples_are_linked_to_their_adapter_and_nested_below_the_run_that_it_belongs_to(client):
    config = load("mnist5k", {"eps": "5"})
    with tracking.run("finetune", config) as finetune:
        finetune.tags({"run_id_of_adapter": "abc"})
        finetune.privacy(PRIVATE)
    with tracking.run("sample", config, command="mlflow run . -e sample") as sample:
        sample.made_from("adapter", nest=True, stage="finetune", run_id_of_adapter="abc")
        sample.made_from("base", nest=True, output="nobody made it")
    with tracking.run("fid", config) as fid:
        fid.made_from("samples", nest=True, stage="sample")
    tags = {run.run_id: client.get_run(run.run_id).data.tags for run in (finetune, sample, fid)}
    assert "4.99912" in tags[finetune.run_id][NOTE]
    assert f"adapter: [mnist5k eps=5 r=4 k=1](#/experiments/{sample.experiment_id}" in tags[sample.run_id][NOTE]
    assert "mlflow run . -e sample" in tags[sample.run_id][NOTE]
    assert tags[sample.run_id]["made_from.adapter"] == finetune.run_id
    assert "made_from.base" not in tags[sample.run_id]
    assert tags[sample.run_id]["mlflow.parentRunId"] == tags[fid.run_id]["mlflow.parentRunId"] == finetune.run_id


def test_a_description_that_the_user_gave_stays(client, monkeypatch):
    run_id = client.create_run("0", tags={NOTE: "mine"}).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    with tracking.run("finetune", load("mnist5k")) as run:
        run.privacy(PRIVATE)
    assert client.get_run(run_id).data.tags[NOTE] == "mine"


def test_pictures_of_one_name_are_one_series_over_steps_on_the_chart_page(client, tmp_path):
    Image.new("P", (8, 8)).save(tmp_path / "a.png")
    with tracking.run("finetune", load("mnist5k")) as run:
        for step in (50, 100):
            run.image(f"grids/step-{step:06d}.png", tmp_path / "a.png")
        run.image("samples", tmp_path / "a.png")
    names = {entry.path.removeprefix("images/") for entry in client.list_artifacts(run.run_id, "images")}
    kept = {tuple(re.split(r"[%+]", name)[:3]) for name in names}
    assert kept == {("grids", "step", "50"), ("grids", "step", "100"), ("samples", "step", "0")}
    assert "mlflow.loggedImages" in client.get_run(run.run_id).data.tags
