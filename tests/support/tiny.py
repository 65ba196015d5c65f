"""A tiny model, tiny private data and a tiny private run, for tests of the private step and of fine-tuning."""

import functools
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dp_lora.config import Config, load
from dp_lora.config.schema import Lora
from dp_lora.data.layout import Picture, write_dataset
from dp_lora.data.png import encode_png
from dp_lora.diffusion import make_scheduler
from dp_lora.models.adapters import WEIGHTS, Adapter, add_lora, save_adapter
from dp_lora.models.autoencoder import build_autoencoder
from dp_lora.models.folder import Model, load_model, save_model
from dp_lora.models.info import model_digest, model_info
from dp_lora.models.unet import build_unet
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.release import write_result
from tests.support.templates import from_template

CPU = torch.device("cpu")
TINY = (
    "public.size=16 data.size=16 public.classes=[A,B,C] data.classes=[x,y] data.n_public=40 public.n=12 "
    "autoencoder.block_out_channels=[8,8] autoencoder.norm_num_groups=4 autoencoder.latent_channels=2 "
    "ldm.block_out_channels=[8,16] ldm.attention=[true,true] ldm.attention_head_width=4 ldm.norm_num_groups=4 "
    "ldm.cross_attention_dim=6 lora.rank=2 privacy.batch_size=8 privacy.epochs=1 privacy.delta=1e-3 "
    "sampling.steps=2 sampling.n=4 sampling.attempts=1 train.grid_every=0 train.checkpoint_every=1 "
    "evaluation.public_reference=null"
)


@functools.cache  # a config is frozen; resolving one takes a tenth of a second, and most tests need the same few
def tiny_config(overrides: str = "") -> Config:
    return load("mnist5k", {}, f"{TINY} {overrides}")


def make_base(folder: Path, config: Config, status: str = "public") -> None:
    """Write a tiny base model; no weight is zero, so every weight can get a gradient."""
    key = ("base", repr((config.public, config.autoencoder, config.ldm)), status)
    generator = from_template(folder, key, lambda template: _write_base(template, config, status))
    # the next random numbers of a test must not depend on whether the base was made or copied
    torch.set_rng_state(generator)


def _write_base(folder: Path, config: Config, status: str) -> Tensor:
    """Write the base; gives the state of torch's generator after that."""
    torch.manual_seed(5)
    vae = build_autoencoder(config.autoencoder, config.public.channels, config.public.size)
    unet = build_unet(config.ldm, config.autoencoder.latent_channels, 8)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ldm = config.ldm
    scheduler = make_scheduler(ldm.beta_schedule, ldm.beta_start, ldm.beta_end, ldm.prediction_type)
    info = model_info(
        classes=list(config.public.classes),
        null_row=True,
        size=config.public.size,
        channels=config.public.channels,
        prediction_type=ldm.prediction_type,
        trained_on={"source": "test"},
        privacy_status=status,
        seed=5,
        sections={},
    )
    save_model(folder, unet, vae, scheduler, torch.randn(4, ldm.cross_attention_dim), info)
    return torch.get_rng_state()


def tiny_model(tmp_path: Path, config: Config | None = None, device: torch.device = CPU) -> Model:
    config = config or tiny_config()
    make_base(tmp_path / "base", config)
    return load_model(tmp_path / "base", device)


def lora_settings(**others: Any) -> Lora:
    """The default experiment's LoRA section with rank 2 and `others`."""
    return replace(load("mnist5k").lora, **{"rank": 2} | others)


def tiny_adapter(model: Model, targets: str = "default", classes: int = 2) -> Adapter:
    """An adapter whose A and B are both not zero, so that every trained weight has a gradient."""
    generator = torch.Generator().manual_seed(3)
    lora = add_lora(model.denoiser, lora_settings(targets=targets), generator)
    for name, parameter in model.denoiser.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    embedding = torch.randn(classes, model.class_embedding.shape[1], generator=generator).to(model.denoiser.device)
    return Adapter(model.denoiser, lora, embedding.requires_grad_())


def saved_adapter(folder: Path, adapter: Adapter) -> Path:
    """Save the adapter into a new folder."""
    folder.mkdir()
    save_adapter(folder, adapter, ["x", "y"], {"path": "base", "digest": "0"}, {"source": "folder"}, "unknown")
    return folder


def tiny_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of a tiny UNet: latents, timesteps and a context of one token."""
    return torch.randn(2, 2, 8, 8), torch.tensor([3, 700]), torch.randn(2, 1, 6)


def differences_in_a_fresh_process(
    tmp_path: Path, folder: Path, inputs: tuple[Tensor, Tensor, Tensor], expected: Tensor
) -> list[float]:
    """Distance from `expected` of tmp_path/base with the adapter of `folder`, by diffusers' loader and by PEFT's."""
    torch.save({"inputs": list(inputs), "expected": expected}, tmp_path / "io.pt")
    script = f"""
import torch
from diffusers import UNet2DConditionModel
from peft import PeftModel
io = torch.load({str(tmp_path / "io.pt")!r}, weights_only=True)
def base():
    return UNet2DConditionModel.from_pretrained({str(tmp_path / "base" / "unet")!r})
unet = base()
unet.load_lora_adapter({str(folder)!r}, weight_name={WEIGHTS!r}, prefix=None)
peft = PeftModel.from_pretrained(base(), {str(folder / "peft")!r})
with torch.no_grad():
    for model in (unet, peft):
        print(float((model(*io["inputs"]).sample - io["expected"]).abs().max()))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return [float(line) for line in result.stdout.split()]


def tiny_latents(n: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((n, 2, 8, 8)).astype(np.float32), rng.integers(0, 2, n)


def tiny_dataset(folder: Path, n: int = 40, seed: int = 0) -> None:
    """Write a dataset of classes x and y; its first pictures are the same for every n."""
    from_template(folder, ("dataset", n, seed), lambda template: _write_dataset(template, n, seed))


def _write_dataset(folder: Path, n: int, seed: int) -> None:
    pictures = []
    for index in range(n):
        rng = np.random.default_rng([seed, index])
        image = rng.integers(0, 256, (16, 16, 1), dtype=np.uint8)
        split = "train" if index % 5 else "test"
        pictures.append(Picture(f"{index:04d}.png", "xy"[index % 2], split, encode_png(image)))
    write_dataset(folder, pictures, {"source": "test"}, 16, 1, packed=True)


def plan_of(**changes: object) -> PrivacyPlan:
    values: dict = {
        "sample_rate": 0.5,
        "noise_multiplier": 1.0,
        "max_grad_norm": 0.1,
        "steps": 10,
        "expected_batch": 4.0,
        "delta": 1e-3,
        "target_epsilon": 5.0,
        "k": 1,
        "unit": "picture",
    }
    return PrivacyPlan(**{**values, **changes})


def no_privacy(**changes: object) -> PrivacyPlan:
    return plan_of(noise_multiplier=0.0, max_grad_norm=math.inf, target_epsilon=math.inf, **changes)


def total_norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: a[name].double() - b[name].double() for name in a}


def make_release(base: Path, folder: Path, private: bool = True) -> Path:
    """Write a release as fine-tuning does: a tiny adapter on the base in `base`."""
    model = load_model(base)
    names = {"path": str(base), "digest": model_digest(base)}
    plan = plan_of(target_epsilon=8.0) if private else no_privacy()
    write_result(folder, plan, 10, "0" * 32, "0" * 64, tiny_config(), tiny_adapter(model), (), names)
    return folder


def card_code(folder: Path) -> list[str]:
    """The blocks of Python in a model card, each to be run in its folder."""
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def linear_loss(directions: torch.Tensor):
    """Loss of row r: <directions[picture of r], its unit's copy of w>; a unit's gradient is its mean direction."""

    def factory(_draws):
        def loss(copies, rows):
            return (copies["w"][rows.slot] * directions[rows.picture]).sum(1)

        return loss

    return factory


def far(a, b):
    return total_norm(difference(a, b)) / total_norm(b)
