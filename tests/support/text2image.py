"""Private fine-tuning of tiny pipelines: config, pictures with captions or classes, per-unit gradients, a release."""

from dataclasses import replace

import numpy as np
import torch

from dp_lora.config import load
from dp_lora.data.conditions import encode_captions
from dp_lora.diffusion import process_of
from dp_lora.events import Events
from dp_lora.models.adapters import lora_parameters, ready_to_draw
from dp_lora.models.device import pick_precision
from dp_lora.models.folder import load_model
from dp_lora.models.info import model_digest
from dp_lora.privacy.gradients import micro_batches, part_gradients
from dp_lora.privacy.randomness import ItemStreams
from dp_lora.team import Team
from dp_lora.training.finetune import PrivateData, assist, finetune, make_adapter
from dp_lora.training.private_loss import diffusion_loss
from dp_lora.training.resolved import stated_info
from dp_lora.training.run_folder import binding, open_run_folder
from tests.support.tiny_pipelines import SIZE

CPU = torch.device("cpu")
ALONE = Team()
TEXTS = [["a red apple"], ["a dog"], ["two cats on a mat"], ["a red apple"], ["x"], ["the moon over a lake"]]
LABELS = np.array([0, 1, 2, 0, 1, 1])
SETTINGS = (
    "data.path=nowhere data.captions=true data.classes=[] data.n_public=40 data.size=32 data.channels=3 "
    "sampling.prompts='a sun|a tree' lora.rank=2 lora.train=AB privacy.batch_size=8 privacy.epochs=1 "
    "privacy.delta=1e-3 train.timestep_min=0 train.grid_every=0 train.checkpoint_every=1 sampling.steps=2 sampling.n=4 "
    "sampling.guidance_scale=2 model.privacy_status=public compute.device=cpu"
)
CLASSES = "data.captions=false data.classes=[cat,dog,owl] sampling.eta=0"


def text_config(overrides="", name=""):
    return load("folder", {}, f"{SETTINGS} {CLASSES if name == 'dit' else ''} {overrides}")


def prepared(bases, name, tmp_path, overrides=""):
    """Config, model, its adapter without zero weights, the latents of six pictures, and their captions."""
    config = text_config(overrides, name)
    model = load_model(bases[name], CPU, pick_precision(config.compute.precision, CPU))
    model = replace(model, info={**model.info, "size": SIZE})
    adapter = make_adapter(config, model, CPU)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in lora_parameters(model.denoiser, "B").values():
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    data = private_data(config, model, tmp_path / "captions")
    return config, model, adapter, data.latents, data.captions


def private_data(config, model, folder):
    """The latents of the six pictures, and their captions or classes."""
    latents = np.random.default_rng(1).standard_normal((6, *model.latent_shape(SIZE)), dtype=np.float32)
    return PrivateData(latents, LABELS, [[i] for i in range(6)], captions_of(config, model, folder))


def captions_of(config, model, folder, texts=TEXTS):
    """The encoded captions of the six pictures; None for a family that is conditioned on classes."""
    return None if model.family.of_classes else encode_captions(config, texts, model, folder)


def gradients_of(config, model, adapter, latents, captions, units, rows):
    """Gradients in float64, by number of the unit and name of the trained tensor."""
    loss = diffusion_loss(config, model, latents, LABELS, CPU, captions)(ItemStreams(3))
    found = {}
    for batch in micro_batches(units, 1, rows, CPU):
        parts, _ = part_gradients(loss, adapter.parameters("AB"), batch)
        for place, unit in enumerate(batch.units):
            for name, gradient in parts.items():
                key = (unit, name)
                found[key] = found.get(key, 0) + gradient[place].double()
    return {unit: {name: g for (u, name), g in found.items() if u == unit} for unit in range(len(units))}


def plain_gradient(config, model, adapter, latents, captions, unit):
    """A unit's gradient as `gradients_of` names it, by plain autograd on the trained tensors themselves: one row at a
    time, without copies, padding or micro-batches."""
    parameters, draws = adapter.parameters("AB"), ItemStreams(3)
    process, (low, high) = process_of(model.scheduler, "base"), (config.train.timestep_min, config.train.timestep_max)
    for parameter in parameters.values():
        parameter.requires_grad_()
    losses = []
    for picture in unit:
        x0 = torch.from_numpy(latents[[picture]])
        t = torch.from_numpy(np.array([process.time(draws[picture], low, high)], process.times))
        noise = torch.from_numpy(draws[picture].standard_normal(x0.shape, dtype=np.float32))
        x_t, target = process.noised(x0, noise, t)
        if captions is None:
            condition = {"context": adapter.embedding[LABELS[picture]][None, None]}
        else:
            condition = captions.rows(captions.of[picture])
        losses.append((model.predict(x_t, t, condition) - target).square().mean())
    gradients = torch.autograd.grad(torch.stack(losses).mean(), list(parameters.values()))
    return {name: gradient.double() for name, gradient in zip(parameters, gradients, strict=True)}


def fine_tuned(folder, base, overrides="", run="run", team=ALONE):
    """Fine-tune privately for a few steps on six pictures with captions or classes, in folder/run; gives the release.

    All ranks of `team` but the first assist.
    """
    config = text_config(f"{overrides} model.base={base}", base.name)
    model = load_model(base)
    model = ready_to_draw(replace(model, info=stated_info(config, base)), config)
    data = private_data(config, model, folder / f"captions-{team.rank}")
    if not team.first:
        assist(config, model, data, CPU, team)
        return folder / run
    bound = binding(config, "0" * 64, model_digest(base), "cpu")
    with open_run_folder(folder / run, config, bound) as opened:
        names = {"path": str(base), "digest": bound["base"]}
        return finetune(config, model, names, data, opened, CPU, Events(), lambda *_: None, team)
