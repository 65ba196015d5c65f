"""One step over given pictures, in each way that the benchmarks compare; a step is a function of no arguments."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from opacus import GradSampleModule
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.setups import Setup, TextSetup
from dp_lora.diffusion import diffuse, loss_per_row, target
from dp_lora.models.autoencoder import encode
from dp_lora.models.device import full_precision, pick_precision
from dp_lora.models.targets import lora_targets
from dp_lora.privacy.heads import Heads
from dp_lora.privacy.ledger import Ledger
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.privacy.randomness import Randomness
from dp_lora.privacy.step import noisy_sum
from dp_lora.training.physical_batch import evenly
from dp_lora.training.private_loss import diffusion_loss

Step = Callable[[], object]
CLIP, NOISE = 1e-3, 1e-4  # max_grad_norm, standard deviation; they do not change the time


def private(
    setup: Setup, pictures: Sequence[int], k: int, physical_batch: int | None = None, *, one_token: bool = True
) -> Step:
    """Our whole private step; `one_token` False: with diffusers' cross-attention.

    The sample rate is 1, so all `pictures` take part. The step draws units, makes k draws of each, runs forward and
    backward, clips each unit once, sums, writes the ledger's line and its head to the disk, and adds noise.
    """
    rows = evenly(len(pictures) * k, physical_batch or setup.physical_batch, k)
    model = setup.model()
    if not one_token:
        model.denoiser.set_attn_processor(AttnProcessor2_0())
    _, parameters = setup.adapter(model.denoiser)
    factory = diffusion_loss(setup.config, model, setup.latents, setup.labels, setup.device, setup.captions())
    randomness = Randomness("benchmark")
    units = [[picture] for picture in pictures]
    plan = PrivacyPlan(1.0, NOISE / CLIP, CLIP, 10**6, float(len(units)), 1e-5, 1.0, k, "picture")
    folder = TemporaryDirectory()  # removed with the step
    heads = Heads(Path(folder.name) / "heads" / "benchmark")
    heads.make()
    ledger = Ledger(Path(folder.name) / "ledger.jsonl", heads)

    def step(folder: object = folder) -> dict[str, Tensor]:
        with full_precision():
            total, _ = noisy_sum(plan, 0, units, factory, parameters, randomness, ledger, rows)
        return total

    return step


@contextmanager
def _as_configured(setup: Setup) -> Iterator[None]:
    """Use compute.precision for a whole forward pass, with TF32 off, as the private step does."""
    bfloat16 = pick_precision(setup.config.compute.precision, setup.device) == torch.bfloat16
    with full_precision(), torch.autocast(setup.device.type, dtype=torch.bfloat16, enabled=bfloat16):
        yield


def own_floor(setup: Setup, pictures: Sequence[int], k: int) -> Step:
    """Our own forward pass without privacy: the same draws, one gradient of the mean loss for shared weights."""
    model = setup.model()
    adapter, parameters = setup.adapter(model.denoiser)
    alphas_cumprod = model.scheduler.alphas_cumprod.to(setup.device)
    labels = torch.as_tensor(setup.labels, device=setup.device)
    rows = [picture for picture in pictures for _ in range(k)]
    leaves = list(parameters.values())

    def step() -> None:
        rng = np.random.default_rng()
        _clear(leaves)
        for start in range(0, len(rows), setup.physical_batch):
            part = rows[start : start + setup.physical_batch]
            x0 = torch.from_numpy(setup.latents[part]).to(setup.device)
            t = torch.from_numpy(rng.integers(0, 1000, len(part))).to(setup.device)
            noise = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32)).to(setup.device)
            context = adapter.embedding[labels[part]].unsqueeze(1)
            with _as_configured(setup):
                prediction = model.denoiser(diffuse(x0, noise, alphas_cumprod, t), t, context).sample
                wanted = target(x0, noise, alphas_cumprod, t, setup.config.ldm.prediction_type)
                (loss_per_row(prediction.float(), wanted).sum() / len(rows)).backward()

    return step


class StockModel(nn.Module):
    """diffusers' UNet with PEFT's adapter on `targets`, and a class embedding, as users train them today."""

    def __init__(self, unet: UNet2DConditionModel, targets: Sequence[str], rank: int, embedding: Tensor) -> None:
        super().__init__()
        self.unet = unet
        self.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)))
        self.embedding = nn.Embedding.from_pretrained(embedding.detach(), freeze=False)

    def forward(self, noisy: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.unet(noisy, t, self.embedding(labels).unsqueeze(1)).sample


def _stock_model(setup: Setup, targets: str) -> StockModel:
    return StockModel(setup.stock_unet(), lora_targets(targets), setup.config.lora.rank, setup.embedding())


def stock_floor(setup: Setup, pictures: Sequence[int], k: int) -> Step:
    """The stock non-private step: diffusers and PEFT, the same targets and rank, gradients accumulated."""
    model = _stock_model(setup, setup.config.lora.targets)
    scheduler = setup.model().scheduler
    labels = torch.as_tensor(setup.labels, device=setup.device)
    rows = [picture for picture in pictures for _ in range(k)]
    return _stock_step(setup, rows, scheduler, model, lambda noisy, t, part: model(noisy, t, labels[part]))


def stock_text_floor(setup: TextSetup, pictures: Sequence[int]) -> Step:
    """As `stock_floor`, for a text-to-image base: the step of diffusers' LoRA scripts, with encoded captions."""
    model, captions = setup.model(), setup.captions()
    unet, scheduler = model.denoiser, model.scheduler
    rank, targets = setup.config.lora.rank, list(model.family.targets)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))

    def predict(noisy: Tensor, t: Tensor, part: list[int]) -> Tensor:
        context = captions.rows([captions.of[picture][0] for picture in part])["context"].to(setup.device)
        return unet(noisy, t, context).sample

    return _stock_step(setup, list(pictures), scheduler, unet, predict)


def _stock_step(
    setup: Setup,
    rows: list[int],
    scheduler: DDIMScheduler,
    trained: nn.Module,
    predict: Callable[[Tensor, Tensor, list[int]], Tensor],
) -> Step:
    """One gradient of the mean loss over `rows` (pictures), accumulated over physical batches, as training scripts do.

    `predict` gives the network's output for noisy latents, timesteps and the pictures that they are of.
    """
    leaves = [parameter for parameter in trained.parameters() if parameter.requires_grad]

    def step() -> None:
        _clear(leaves)
        for start in range(0, len(rows), setup.physical_batch):
            part = rows[start : start + setup.physical_batch]
            x0 = torch.from_numpy(setup.latents[part]).to(setup.device)
            noise = torch.randn_like(x0)
            t = torch.randint(0, 1000, (len(part),), device=setup.device)
            noisy = scheduler.add_noise(x0, noise, t)
            with _as_configured(setup):
                loss = functional.mse_loss(predict(noisy, t, part).float(), noise)
                (loss * len(part) / len(rows)).backward()

    return step


def published(setup: Setup, pictures: Sequence[int], k: int, physical_pictures: int) -> Step:
    """An emulation of the pipeline released with the paper: Opacus' hooks, and the autoencoder in every step.

    It encodes `physical_pictures` pictures at a time, repeats each k times, adapts all four projections, and clips each
    row separately. That clip makes its epsilon wrong; here only its time matters.
    """
    model = _stock_model(setup, "study")
    hooked = GradSampleModule(model, batch_first=True, loss_reduction="sum")
    vae, scheduler = setup.vae(), setup.model().scheduler
    generator = torch.Generator().manual_seed(3)
    side, channels = setup.config.data.size, setup.config.data.channels
    pixels = torch.rand(len(pictures), channels, side, side, generator=generator) * 2 - 1
    pixels = pixels.to(setup.device)
    labels = torch.as_tensor(setup.labels, device=setup.device)[list(pictures)]
    leaves = [parameter for parameter in hooked.parameters() if parameter.requires_grad]

    def step() -> list[Tensor]:
        total = [torch.zeros_like(leaf) for leaf in leaves]
        for start in range(0, len(pictures), physical_pictures):
            part = slice(start, start + physical_pictures)
            with torch.no_grad():
                x0 = encode(vae, pixels[part]).repeat_interleave(k, 0)
            noise = torch.randn_like(x0)
            t = torch.randint(0, 1000, (len(x0),), device=setup.device)
            prediction = hooked(scheduler.add_noise(x0, noise, t), t, labels[part].repeat_interleave(k))
            (prediction - noise).square().mean((1, 2, 3)).sum().backward()
            samples = [leaf.grad_sample for leaf in leaves]
            norms = torch.stack([sample.flatten(1).norm(dim=1) for sample in samples], 1).norm(dim=1)
            factors = (CLIP / (norms + 1e-6)).clamp(max=1)
            for so_far, sample in zip(total, samples, strict=True):
                so_far.add_(torch.einsum("i,i...", factors, sample))
            hooked.zero_grad(set_to_none=True)
        return [value + NOISE * torch.randn_like(value) for value in total]

    return step


def _clear(leaves: Sequence[Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = None
