"""Stage `pretrain_ae`: the KL autoencoder with latent diffusion's loss (Rombach et al. 2022, section 3.1, app. G)."""

import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from dp_lora.config.schema import Config
from dp_lora.data.layout import Dataset, read_dataset
from dp_lora.data.pixels import to_uint8
from dp_lora.errors import InputError
from dp_lora.events import Events
from dp_lora.files import digest_value
from dp_lora.grids import write_grid
from dp_lora.learning_rate import lr_factor
from dp_lora.models.autoencoder import build_autoencoder, decode, encode
from dp_lora.models.device import pick_device
from dp_lora.models.folder import save_autoencoder
from dp_lora.models.info import model_info
from dp_lora.training.discriminator import PatchDiscriminator, adaptive_weight, hinge_loss
from dp_lora.training.fit import CHECKPOINT_SECONDS, PublicTraining, fit
from dp_lora.training.perceptual import Perceptual
from dp_lora.training.pictures import Pictures, recoloured
from dp_lora.training.seeds import seeded
from dp_lora.training.steps import EpochOrder, step_generator, total_steps

GRID_COLUMNS = 10
GRID = "reconstructions.png"
ENCODE_VALUES = 2**18  # pixel values per batch of the final statistics


class AutoencoderTraining(PublicTraining):
    """One step: reconstruct a sample of the posterior, then, from `disc_start` on, teach the discriminator."""

    def __init__(self, config: Config, pictures: Pictures, n: int, perceptual: Perceptual | None) -> None:
        settings = config.autoencoder
        super().__init__(total_steps(settings.epochs, n, settings.batch_size))
        self.automatic_optimization = False
        self.settings, self.seed = settings, config.experiment.seed
        self.pictures, self.perceptual = pictures, perceptual
        self.order = EpochOrder(n, settings.batch_size, self.seed)
        with seeded(self.seed, "autoencoder"):
            vae = build_autoencoder(settings, config.public.channels, config.public.size)
            if not isinstance(vae, AutoencoderKL):
                raise InputError(
                    f"autoencoder.kind={settings.kind}: pretrain_ae trains KL autoencoders, a VQ one comes with an "
                    "imported checkpoint; set autoencoder.kind=kl autoencoder.num_vq_embeddings=null"
                )
            self.vae = vae
            adversarial = settings.disc_start is not None
            self.discriminator = PatchDiscriminator(config.public.channels, config.public.size) if adversarial else None

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        networks = [self.vae] if self.discriminator is None else [self.vae, self.discriminator]
        return [torch.optim.AdamW(network.parameters(), lr=self.settings.lr, fused=True) for network in networks]

    def training_step(self, step: int) -> dict[str, Tensor]:
        self.set_lr(self.settings.lr * lr_factor(self.settings.lr_schedule, step, self.steps.total))
        pixels = self.pictures(self.order.rows(step))
        if self.settings.recolour > 0:
            pixels = recoloured(pixels, self.settings.recolour, step_generator(self.seed, step, "recolour"))
        pixels = pixels.to(self.device)
        posterior = self.vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=step_generator(self.seed, step, "autoencoder"))
        reconstruction = self.vae.decode(posterior.mean + posterior.std * noise.to(self.device)).sample

        losses = self._reconstruction_losses(pixels, reconstruction)
        # summed over the latent, divided by the number of pixel values: on the scale of a loss per pixel value
        losses["kl"] = posterior.kl().mean() / pixels[0].numel()
        weights = {
            "mse": self.settings.mse_weight,
            "l1": self.settings.l1_weight,
            "lpips": self.settings.lpips_weight,
        }
        fidelity = torch.stack([weights[name] * losses[name] for name in weights if name in losses]).sum()
        loss = fidelity + self.settings.kl_weight * losses["kl"]
        optimizers = self._optimizers()
        if self.discriminator is None or self.settings.disc_start is None or step < self.settings.disc_start:
            self._update(optimizers[0], loss)
            return losses | {"loss": loss}

        self.discriminator.requires_grad_(False)
        generator = -self.discriminator(reconstruction).mean()
        weight = adaptive_weight(fidelity, generator, self.vae.decoder.conv_out.weight)
        loss = loss + self.settings.disc_weight * weight * generator
        self._update(optimizers[0], loss)
        self.discriminator.requires_grad_(True)
        losses["discriminator"] = hinge_loss(self.discriminator(pixels), self.discriminator(reconstruction.detach()))
        self._update(optimizers[1], losses["discriminator"])
        return losses | {"generator": generator, "loss": loss}

    def _reconstruction_losses(self, pixels: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        difference = reconstruction - pixels
        losses = {"mse": difference.square().mean(), "l1": difference.abs().mean()}
        if self.perceptual is not None:
            losses["lpips"] = self.perceptual(pixels, reconstruction)
        return losses

    def _optimizers(self) -> list[LightningOptimizer]:
        found = self.optimizers()
        return found if isinstance(found, list) else [found]

    def _update(self, optimizer: LightningOptimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


def train_autoencoder(
    config: Config,
    dataset_folder: Path,
    working_folder: Path,
    out_folder: Path,
    events: Events,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> None:
    """Train on the public pictures of `dataset_folder` and write an autoencoder folder with a grid of reconstructions.

    Steps = ceil(epochs * pictures / batch_size). An interrupted training continues from its checkpoint in
    `working_folder`, which keeps trainings of other settings or data apart; on one CPU the result is then bit for bit
    that of an unbroken run. `events` gets the losses every 50 steps, and the grid. Raises InputError, one line, for
    widths that do not fit the pictures, missing LPIPS weights, and a loss that is no longer finite.
    """
    device = pick_device(config.compute.device)
    perceptual = Perceptual(config.public.size, device) if config.autoencoder.lpips_weight > 0 else None
    dataset = read_dataset(dataset_folder, config.public.classes, "train")
    pictures = Pictures(dataset)
    module = AutoencoderTraining(config, pictures, len(dataset), perceptual)
    sections = {"public": asdict(config.public), "autoencoder": asdict(config.autoencoder)}
    key = digest_value([sections, config.experiment.seed, dataset.digest()])
    folder = Path(working_folder) / key[:16]
    fit(module, folder, device, "autoencoder", config.autoencoder.batch_size, events, None, checkpoint_seconds)

    vae = module.to(device).vae.eval().requires_grad_(False)
    mean, std = latent_statistics(vae, pictures, len(dataset), device)
    vae.register_to_config(latents_mean=mean, latents_std=std)
    _reconstructions(vae, pictures, dataset, config, folder / GRID, device)
    info = model_info(
        classes=config.public.classes,
        null_row=False,
        size=config.public.size,
        channels=config.public.channels,
        prediction_type=None,
        trained_on={"source": config.public.source, "digest": dataset.digest()},
        privacy_status="public",
        seed=config.experiment.seed,
        sections=sections,
    )
    save_autoencoder(out_folder, vae, info, extra=[folder / GRID])
    shutil.rmtree(folder)
    events.image("reconstructions", Path(out_folder) / GRID)


@torch.inference_mode()
def latent_statistics(
    vae: AutoencoderKL, pictures: Pictures, n: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per latent channel of the posterior means of n public pictures, in float64."""
    rows_at_once = max(1, ENCODE_VALUES // pictures(np.arange(1))[0].numel())
    total, squares, count = torch.zeros(()), torch.zeros(()), 0
    for start in range(0, n, rows_at_once):
        pixels = pictures(np.arange(start, min(n, start + rows_at_once))).to(device)
        latents = vae.encode(pixels).latent_dist.mean.double().cpu()
        total = total + latents.sum(dim=(0, 2, 3))
        squares = squares + latents.square().sum(dim=(0, 2, 3))
        count += latents[:, 0].numel()
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(1e-12).sqrt()
    return mean.tolist(), std.tolist()


@torch.inference_mode()
def _reconstructions(
    vae: AutoencoderKL, pictures: Pictures, dataset: Dataset, config: Config, path: Path, device: torch.device
) -> None:
    """One column per picture, spread over the classes: the picture above, its reconstruction below."""
    first_of_class = [
        rows[0] for c in range(len(config.public.classes)) if len(rows := np.flatnonzero(dataset.labels == c))
    ]
    chosen = np.array(first_of_class)[np.linspace(0, len(first_of_class) - 1, GRID_COLUMNS).round().astype(int)]
    pixels = pictures(np.unique(chosen)).to(device)
    pairs = [to_uint8(pixels.cpu()), to_uint8(decode(vae, encode(vae, pixels)).cpu())]
    write_grid(path, pairs, ["picture", "reconstructed"])
