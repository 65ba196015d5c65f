"""A tiny private fine-tuning of a text-to-image base, on six pictures with captions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dp_lora.config import Config, load
from dp_lora.data.conditions import encode_captions
from dp_lora.events import Events
from dp_lora.models.adapters import ready_to_draw
from dp_lora.models.folder import Model, load_model
from dp_lora.models.info import model_digest
from dp_lora.team import Team
from dp_lora.training.finetune import PrivateData, assist, finetune
from dp_lora.training.resolved import stated_info
from dp_lora.training.run_folder import binding, open_run_folder
from tests.support.tiny_pipelines import SIZE

CPU = torch.device("cpu")
TEXTS = [["a red apple"], ["a dog"], ["two cats on a mat"], ["a red apple"], ["x"], ["the moon over a lake"]]
SETTINGS = (
    "data.path=nowhere data.captions=true data.classes=[] data.n_public=40 data.size=32 data.channels=3 "
    "sampling.prompts='a sun|a tree' lora.rank=2 lora.train=AB privacy.batch_size=8 privacy.epochs=1 "
    "privacy.delta=1e-3 train.timestep_min=0 train.grid_every=0 train.checkpoint_every=1 sampling.steps=2 sampling.n=4 "
    "sampling.guidance_scale=2 model.privacy_status=public compute.device=cpu"
)


def text_config(overrides: str = "") -> Config:
    return load("folder", {}, f"{SETTINGS} {overrides}")


def text_data(model: Model, folder: Path) -> PrivateData:
    """Six latents and their captions; the captions' cache lies in `folder`."""
    latents = np.random.default_rng(1).standard_normal((6, *model.latent_shape(SIZE)), dtype=np.float32)
    captions = encode_captions(TEXTS, model, SIZE, folder / "captions")
    return PrivateData(latents, np.zeros(6, np.int64), [[i] for i in range(6)], captions)


def fine_tuned(folder: Path, base: Path, overrides: str = "", run: str = "run", team: Team | None = None) -> Path:
    """A private fine-tuning of a few steps in folder/run; gives the release. Other ranks than the first assist."""
    config = text_config(f"{overrides} model.base={base}")
    model = ready_to_draw(replace(load_model(base), info=stated_info(config, base)), config)
    team = team or Team()
    data = text_data(model, folder / f"rank-{team.rank}")
    if not team.first:
        assist(config, model, data, CPU, team)
        return folder / run
    bound = binding(config, "0" * 64, model_digest(base), "cpu")
    with open_run_folder(folder / run, config, bound) as opened:
        names = {"path": str(base), "digest": bound["base"]}
        return finetune(config, model, names, data, opened, CPU, Events(), lambda *_: None, team)
