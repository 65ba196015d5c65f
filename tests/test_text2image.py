"""Text-to-image bases: per-unit gradients, rows apart, dead targets, checkpointing, releases that load elsewhere."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dp_lora.config import load
from dp_lora.data.conditions import encode_captions
from dp_lora.models.adapters import lora_parameters
from dp_lora.models.folder import load_model
from dp_lora.privacy.gradients import micro_batches, part_gradients
from dp_lora.privacy.randomness import ItemStreams
from dp_lora.training.finetune import make_adapter
from dp_lora.training.private_loss import diffusion_loss
from tests.support.tiny import difference, total_norm
from tests.support.tiny_pipelines import BUILD, SIZE, make_pipeline

CPU = torch.device("cpu")
TEXTS = [["a red apple"], ["a dog"], ["two cats on a mat"], ["a red apple"], ["x"], ["the moon over a lake"]]
SETTINGS = (
    "data.path=nowhere data.captions=true data.classes=[] data.n_public=40 data.size=32 data.channels=3 "
    "sampling.prompts='a sun|a tree' lora.rank=2 lora.train=AB privacy.batch_size=8 privacy.epochs=1 "
    "privacy.delta=1e-3 train.timestep_min=0 train.grid_every=0 train.checkpoint_every=1 sampling.steps=2 sampling.n=4 "
    "sampling.guidance_scale=2 model.privacy_status=public compute.device=cpu"
)


def text_config(overrides=""):
    return load("folder", {}, f"{SETTINGS} {overrides}")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {name: make_pipeline(folder / name, name) for name in BUILD}


def prepared(bases, name, tmp_path, overrides=""):
    """Config, model with an adapter that is away from zero, its parameters, and six pictures with captions."""
    config = text_config(overrides)
    model = load_model(bases[name])
    model = replace(model, info={**model.info, "size": SIZE})
    adapter = make_adapter(config, model, CPU)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in lora_parameters(model.unet, "B").values():
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    latents = np.random.default_rng(1).standard_normal((6, *model.latent_shape(SIZE)), dtype=np.float32)
    captions = encode_captions(TEXTS, model, SIZE, tmp_path / "captions")
    return config, model, adapter, latents, captions


def gradients_of(config, model, adapter, latents, captions, units, rows):
    loss = diffusion_loss(config, model, latents, np.zeros(6, np.int64), CPU, captions)(ItemStreams(3))
    found = {}
    for batch in micro_batches(units, 1, rows, CPU):
        parts, _ = part_gradients(loss, adapter.parameters("AB"), batch)
        for place, unit in enumerate(batch.units):
            for name, gradient in parts.items():
                key = (unit, name)
                found[key] = found.get(key, 0) + gradient[place].double()
    return {unit: {name: g for (u, name), g in found.items() if u == unit} for unit in range(len(units))}


@pytest.mark.parametrize("name", list(BUILD))
def test_each_unit_s_gradient_is_that_of_its_rows_alone_with_and_without_checkpointing(name, bases, tmp_path):
    units = [[0], [1, 2], [3, 4, 5]]
    of = prepared(bases, name, tmp_path)
    together = gradients_of(*of, units, 6)
    for number, unit in enumerate(units):
        alone = gradients_of(*of, [unit], len(unit))[0]
        assert total_norm(alone) > 0
        assert total_norm(difference(together[number], alone)) < 2e-5 * total_norm(alone)
    checkpointed = prepared(bases, name, tmp_path, "compute.checkpointing=always")
    again = gradients_of(*checkpointed, units, 6)
    for number in range(len(units)):
        assert total_norm(difference(again[number], together[number])) < 1e-6 * total_norm(together[number])
