"""A tiny private fine-tuning in this process, its messages and its release."""

from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from dp_lora.data.layout import read_dataset
from dp_lora.data.pixels import to_pixels
from dp_lora.events import Events
from dp_lora.files import digest_value
from dp_lora.models.autoencoder import encode
from dp_lora.models.folder import load_model
from dp_lora.models.info import model_digest
from dp_lora.training import finetune as module
from dp_lora.training.finetune import PrivateData, finetune, units_of
from dp_lora.training.run_folder import binding, open_run_folder
from tests.support.tiny import make_base, tiny_config, tiny_dataset

CPU = torch.device("cpu")


class Heard(Events):
    def __init__(self):
        self.metrics, self.lines = {}, []

    def metric(self, name, value, step=None):
        self.metrics.setdefault(name, []).append(value)

    def message(self, text):
        self.lines.append(text)

    def terminal(self, text):
        self.lines.append(f"terminal alone: {text}")


class Crash(Exception):
    pass


CHECKED = set()  # inputs that have passed the rounding check in this process


def checked_once(context):
    """Run the rounding check, half of a tiny fine-tuning's time, once per input; `context` is a part of the input."""
    real = module.require_small_rounding

    def check(plan, loss_factory, parameters, rows):
        weights = digest_value({name: value.detach().cpu().tolist() for name, value in parameters.items()})
        if (inputs := (context, plan, weights, rows)) not in CHECKED:
            real(plan, loss_factory, parameters, rows)
            CHECKED.add(inputs)

    return patch.object(module, "require_small_rounding", check)


@pytest.fixture
def house(tmp_path):
    """A base model and a private dataset of 40 pictures, 32 of them for training."""
    make_base(tmp_path / "base", tiny_config())
    tiny_dataset(tmp_path / "data")
    return tmp_path


def run(
    house,
    folder,
    overrides="",
    events=None,
    data="data",
    stop_before=None,
    monkeypatch=None,
    base="base",
    keep=None,
    parent=(),
    device=CPU,
    audits=(),
):
    config = tiny_config(overrides)
    dataset = read_dataset(house / data, ["x", "y"], "train")
    model = load_model(house / base, device)
    if keep is not None:
        keep.append(model)
    with torch.no_grad():
        latents = encode(model.vae, to_pixels(dataset.images(slice(None))).to(device)).cpu().numpy()
    bound = binding(config, dataset.digest(), model_digest(house / base), device.type, parent)
    if stop_before is not None:
        real = module.noisy_sum

        def crashing(plan, step, *rest):
            if step == stop_before:
                raise Crash
            return real(plan, step, *rest)

        monkeypatch.setattr(module, "noisy_sum", crashing)
    try:
        # the parts of the config that the loss of dummy pictures reads
        context = repr((config.train, config.compute, config.data, config.lora, bound["base"], device.type))
        with checked_once(context), open_run_folder(house / folder, config, bound) as opened:
            data_in = PrivateData(latents, dataset.labels, units_of(len(dataset), None, "picture"))
            names = {"path": "base", "digest": bound["base"]}
            heard = events or Heard()
            return finetune(config, model, names, data_in, opened, device, heard, lambda *_: None, audits=audits)
    finally:
        if stop_before is not None:
            monkeypatch.setattr(module, "noisy_sum", real)


def weights(folder):
    return load_file(folder / "peft" / "adapter_model.safetensors") | {
        "embedding": load_file(folder / "class_embedding.safetensors")["weight"]
    }


def seed_file(house):
    path = house / "seed"
    path.write_bytes(b"s" * 32)
    path.chmod(0o600)
    return f"privacy.reproducible=true privacy.seed_file={path}"
