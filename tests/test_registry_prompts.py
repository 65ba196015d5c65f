"""A registered text-to-image release takes a column `prompt`, and draws the same images as its base's pipeline."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dp_lora import tracking
from dp_lora.config import load
from dp_lora.models.adapters import apply_adapter, lora_parameters
from dp_lora.models.folder import load_model
from dp_lora.models.info import model_digest
from dp_lora.release import write_result
from dp_lora.sampling import draw
from dp_lora.tracking import registry
from dp_lora.training.finetune import make_adapter
from tests.support.tiny import plan_of
from tests.support.tiny_pipelines import SIZE, make_pipeline
from tests.support.tracking_store import use_store

CPU = torch.device("cpu")
SETTINGS = (
    "data.path=nowhere data.captions=true data.classes=[] data.n_public=40 data.size=32 data.channels=3 "
    "sampling.prompts='a sun|a tree' sampling.negative_prompt=blurred lora.rank=2 lora.train=AB privacy.batch_size=8 "
    "privacy.delta=1e-3 sampling.steps=2 sampling.guidance_scale=2 sampling.batch_size=2 compute.device=cpu"
)


@pytest.fixture(scope="module", params=["sd", "pixart"])
def released(request, tmp_path_factory):
    """A tiny pipeline, and a release on it whose LoRA weights are not zero."""
    folder = tmp_path_factory.mktemp(request.param)
    base, config = make_pipeline(folder / "base", request.param), load("folder", {}, SETTINGS)
    model = load_model(base)
    adapter = make_adapter(config, replace(model, info={**model.info, "size": SIZE}), CPU)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in lora_parameters(model.denoiser, "B").values():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    names = {"path": str(base), "digest": model_digest(base)}
    write_result(folder / "release", plan_of(target_epsilon=8.0), 10, "0" * 32, "0" * 64, config, adapter, (), names)
    return SimpleNamespace(base=base, release=folder / "release", config=config)


def written(released, place: Path) -> Path:
    registry.write_model(place / "model", released.config, released.release, released.base, "0" * 32, "m-0")
    return place / "model"


def test_a_loaded_model_draws_its_prompts_as_the_sampler_does(released, tmp_path, monkeypatch):
    import mlflow
    import pandas

    monkeypatch.setattr(sys, "path", list(sys.path))
    place = written(released, tmp_path)
    loaded = mlflow.pyfunc.load_model(str(place))
    asked = ["a red moon", "a tree", " a red moon "]
    drawn = loaded.predict(pandas.DataFrame({"prompt": asked}), params={"seed": 7})
    model = apply_adapter(load_model(released.base), released.release)
    model = replace(model, info={**model.info, "size": SIZE, "classes": ["a red moon", "a tree"]})
    expected = draw(model, [0, 1, 0], [0, 0, 1], released.config.sampling, 7, CPU)
    assert drawn.shape == (3, SIZE, SIZE, 3)
    assert np.abs(drawn.astype(int) - expected).max() <= 1
    assert np.abs(drawn[0].astype(int) - drawn[2]).max() > 1  # the same prompt gives another image the second time
    plain = replace(released.config.sampling, negative_prompt=None)
    assert np.abs(draw(model, [0, 1, 0], [0, 0, 1], plain, 7, CPU).astype(int) - drawn).max() > 1

    for given, words in (({"prompt": [" "]}, "a prompt is empty"), ({"class": ["a sun"]}, "prompt")):
        with pytest.raises(mlflow.exceptions.MlflowException, match=words):
            loaded.predict(pandas.DataFrame(given))
    names = [column.name for column in loaded.metadata.signature.inputs]
    params = [param.name for param in loaded.metadata.signature.params]
    assert (names, params) == (["prompt"], ["seed", "n", "steps", "guidance_scale"])
    requirements = (place / "requirements.txt").read_text()
    assert "transformers==" in requirements
    kept = [path for path in (place / "artifacts").rglob("*") if path.is_file()]
    assert {path.suffix for path in kept} <= {*registry.PIPELINE_FILES}


def test_a_pipeline_with_another_kind_of_file_is_named_and_not_copied(released, tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setattr(sys, "path", list(sys.path))
    base = shutil.copytree(released.base, tmp_path / "base")
    (base / "vae/diffusion_pytorch_model.bin").write_bytes(b"\x80\x04N.")
    place = tmp_path / "model"
    registry.write_model(place, released.config, released.release, base, "0" * 32, "m-0")
    assert [path.name for path in (place / "artifacts").iterdir()] == ["release"]
    mlflow.pyfunc.load_model(str(place), model_config={"base": str(released.base)})


def test_it_is_registered_with_an_example_of_a_public_prompt(released, tmp_path, monkeypatch, capfd):
    client = use_store(tmp_path, monkeypatch)
    with tracking.run("finetune", released.config) as run:
        run.register(released.config, released.release, released.base)
    assert "registered: models:/dp-lora-folder@eps8, version 1" in capfd.readouterr().err
    said = client.get_registered_model("dp-lora-folder").description
    assert 'pandas.DataFrame({"prompt": ["a sun"]})' in said
