"""Stage `pretrain_ldm`: latent diffusion (Rombach et al. 2022, eq. 3) on latents encoded once, by class or caption."""

import copy
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray
from torch import Tensor, nn

from dp_lora.config.schema import Config
from dp_lora.data.latents import encode_dataset
from dp_lora.data.layout import Dataset, read_dataset
from dp_lora.diffusion import diffuse, loss_per_row, make_scheduler, target
from dp_lora.errors import InputError
from dp_lora.events import Events
from dp_lora.files import digest_value
from dp_lora.learning_rate import lr_factor
from dp_lora.models.autoencoder import Vae, fold_normalisation
from dp_lora.models.device import pick_device
from dp_lora.models.families import CLASSES, FAMILIES, Family
from dp_lora.models.flops import count_operations
from dp_lora.models.folder import Model, load_vae, module_digest, save_model, save_pipeline
from dp_lora.models.info import load_info, model_info
from dp_lora.models.meta import meta_copies
from dp_lora.models.text_encoder import TOKENS, encode_public_captions, load_text_encoder
from dp_lora.models.unet import build_unet
from dp_lora.sampling import write_class_grid
from dp_lora.training.fit import CHECKPOINT_SECONDS, PublicTraining, fit
from dp_lora.training.moving_average import growing_weight, update_average
from dp_lora.training.seeds import seeded
from dp_lora.training.steps import EpochOrder, step_generator, total_steps

GRID = "samples.png"
GRID_COLUMNS = 6
GRID_CLASSES = 40
GRID_STEPS = 10
GRID_GUIDANCE = 3.0
ENCODE_BATCH = 256


class Conditioned(nn.Module):
    """A UNet and its class embedding, averaged together; or a UNet and encoded captions, which are frozen."""

    def __init__(self, config: Config, latent_channels: int, latent_size: int, captions: Tensor | None = None) -> None:
        super().__init__()
        self.unet = build_unet(config.ldm, latent_channels, latent_size)
        rows = len(config.public.classes) + (config.ldm.class_dropout > 0)
        self.embedding = nn.Embedding(rows, config.ldm.cross_attention_dim) if captions is None else None
        self.captions: Tensor
        self.register_buffer("captions", captions, persistent=False)

    def forward(self, latents: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Prediction (N, c, h, w) for noisy latents of that shape, timesteps (N,) and rows of the embedding (N,)."""
        context = self.captions[labels] if self.embedding is None else self.embedding(labels).unsqueeze(1)
        return self.unet(latents, t, encoder_hidden_states=context, return_dict=False)[0]


class LdmTraining(PublicTraining):
    """One step: noise the latents of a batch at random timesteps, predict, and let the average follow."""

    def __init__(
        self, config: Config, latents: NDArray[np.float32], labels: NDArray[np.int64], captions: Tensor | None = None
    ) -> None:
        """`labels` (N,) are rows of the class embedding, or of `captions`, whose last row is the empty one."""
        settings = config.ldm
        super().__init__(total_steps(settings.epochs, len(latents), settings.batch_size))
        self.settings, self.seed = settings, config.experiment.seed
        self.null = len(config.public.classes) if captions is None else len(captions) - 1
        self.latents, self.labels = latents, torch.from_numpy(labels)
        self.order = EpochOrder(len(latents), settings.batch_size, self.seed)
        with seeded(self.seed, "ldm"):
            self.model = Conditioned(config, latents.shape[1], latents.shape[2], captions)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.scheduler = make_scheduler(
            settings.beta_schedule, settings.beta_start, settings.beta_end, settings.prediction_type
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        betas = (self.settings.betas[0], self.settings.betas[1])
        return torch.optim.AdamW(self.model.parameters(), lr=self.settings.lr, betas=betas, fused=True)

    def training_step(self, step: int) -> dict[str, Tensor]:
        factor = lr_factor(self.settings.lr_schedule, step, self.steps.total, self.settings.warmup_steps)
        self.set_lr(self.settings.lr * factor)
        rows = self.order.rows(step)
        x0, labels = torch.from_numpy(np.ascontiguousarray(self.latents[rows])), self.labels[rows]
        generator = step_generator(self.seed, step, "ldm")
        noise = torch.randn(x0.shape, generator=generator)
        alphas_cumprod = self.scheduler.alphas_cumprod
        t = torch.randint(len(alphas_cumprod), (len(rows),), generator=generator)
        dropped = torch.rand(len(rows), generator=generator) < self.settings.class_dropout
        labels = labels.masked_fill(dropped, self.null)

        wanted = target(x0, noise, alphas_cumprod, t, self.settings.prediction_type)
        noisy = diffuse(x0, noise, alphas_cumprod, t)
        noisy, wanted, t, labels = (tensor.to(self.device) for tensor in (noisy, wanted, t, labels))
        return {"loss": loss_per_row(self.model(noisy, t, labels), wanted).mean()}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # here, not in a hook after the batch: the checkpoint is written before such hooks run
        step = self.steps.next - 1
        weight = growing_weight(step, self.settings.ema_decay)
        update_average(self.average.parameters(), self.model.parameters(), weight)


def train_ldm(
    config: Config,
    dataset_folder: Path,
    autoencoder_folder: Path,
    working_folder: Path,
    out_folder: Path,
    events: Events,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> None:
    """Train on the public latents and write a complete model folder, the autoencoder and a grid of samples in it.

    Steps = ceil(epochs * pictures / batch_size); the averaged weights are saved. With class_dropout above 0 the class
    embedding has a last row for 'no class'. With ldm.text_encoder pictures are conditioned on their captions (dropped:
    on the empty one), and the folder is a StableDiffusionPipeline's, with model.json. Interruption, resuming and errors
    as in `train_autoencoder`; `working_folder` also keeps the latents.
    """
    device = pick_device(config.compute.device)
    source = load_info(autoencoder_folder)
    if (source["size"], source["channels"]) != (config.public.size, config.public.channels):
        raise InputError(
            f"{autoencoder_folder}: is for pictures of {source['size']} pixels and {source['channels']} channels, but "
            f"public.size={config.public.size} and public.channels={config.public.channels}; train it anew"
        )
    vae = load_vae(autoencoder_folder, device)
    dataset = read_dataset(dataset_folder, config.public.classes, "train")
    family: Family = CLASSES
    pipe: Any = None
    captions, labels = None, dataset.labels
    if config.ldm.text_encoder is not None:
        family, pipe = _pipeline(config, vae, device)
        captions, labels = _captions(config, dataset, family, pipe)
    latents = encode_dataset(dataset, vae, Path(working_folder) / "latents", device, ENCODE_BATCH, events)
    module = LdmTraining(config, latents, labels, captions)
    sections = {"public": asdict(config.public), "ldm": asdict(config.ldm)}
    networks = [module_digest(vae), *([] if pipe is None else [module_digest(pipe.text_encoder)])]
    key = digest_value([sections, config.experiment.seed, dataset.digest(), *networks])
    folder = Path(working_folder) / key[:16]
    settings = config.ldm
    fit(module, folder, device, "ldm", settings.batch_size, events, settings.gradient_clip, checkpoint_seconds)

    info = model_info(
        classes=config.public.classes if pipe is None else [],
        null_row=settings.class_dropout > 0 and pipe is None,
        size=config.public.size,
        channels=config.public.channels,
        prediction_type=settings.prediction_type,
        trained_on={"source": config.public.source, "digest": dataset.digest()},
        privacy_status=source["privacy_status"],
        seed=config.experiment.seed,
        sections=sections | {"autoencoder": source["config"].get("autoencoder")},
    )
    average = module.average.to(device).eval()
    counted = count_operations(*meta_copies(average.unet, vae), family)
    if average.embedding is not None:
        model = Model(average.unet, vae, module.scheduler, average.embedding.weight, info)
        _sample_grid(model, config, folder / GRID, device)
        save_model(out_folder, average.unet, vae, model.scheduler, model.embedded(), info, [folder / GRID], counted)
    else:
        pipe.register_modules(unet=average.unet, scheduler=module.scheduler)
        info |= {"pipeline": family.pipeline}
        # spread over the dataset, whose pictures come in groups
        shown = np.linspace(0, len(dataset) - 1, GRID_CLASSES).astype(int)
        names = list(dict.fromkeys(_texts(dataset)[row] for row in shown))
        model = Model(average.unet, vae, module.scheduler, None, info | {"classes": names}, family, pipe)
        _sample_grid(model, config, folder / GRID, device)
        save_pipeline(out_folder, pipe, info, [folder / GRID], counted)
    shutil.rmtree(folder)
    events.image("samples", Path(out_folder) / GRID)


def _pipeline(config: Config, vae: Vae, device: torch.device) -> tuple[Family, Any]:
    """Family and pipeline of a captioned base, still without UNet and scheduler; adapts `vae` to it in place."""
    named = config.ldm.text_encoder
    assert named is not None
    tokenizer, encoder = load_text_encoder(named)
    if encoder.config.hidden_size != config.ldm.cross_attention_dim:
        raise InputError(
            f"ldm.cross_attention_dim={config.ldm.cross_attention_dim}: must be {encoder.config.hidden_size}, the "
            "width of ldm.text_encoder"
        )
    fold_normalisation(vae)
    encoder.to(device)  # type: ignore[arg-type]
    parts: Any = (vae, encoder, tokenizer, None, None, None, None)
    pipe: Any = StableDiffusionPipeline(*parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return replace(FAMILIES["StableDiffusionPipeline"], tokens=TOKENS), pipe


def _texts(dataset: Dataset) -> list[str]:
    if dataset.captions is None:
        raise InputError("ldm.text_encoder: the public pictures have no captions; set it to null")
    return [texts[0] for texts in dataset.captions]


def _captions(config: Config, dataset: Dataset, family: Family, pipe: Any) -> tuple[Tensor, NDArray[np.int64]]:
    """Encoded captions on the CPU, each once, the empty one last; and the row of each picture's caption."""
    texts = _texts(dataset)
    distinct = list(dict.fromkeys(texts))
    position = {text: row for row, text in enumerate(distinct)}
    encoded = encode_public_captions(family, pipe, [*distinct, ""], config.public.size)
    return encoded.cpu(), np.array([position[text] for text in texts], np.int64)


def _sample_grid(model: Model, config: Config, path: Path, device: torch.device) -> None:
    sampling = replace(
        config.sampling,
        steps=GRID_STEPS,
        eta=0.0,
        attempts=1,
        guidance_scale=GRID_GUIDANCE if config.ldm.class_dropout > 0 else 1.0,
    )
    names = model.classes[:GRID_CLASSES]
    write_class_grid(path, model, names, GRID_COLUMNS, sampling, config.experiment.seed, device)
