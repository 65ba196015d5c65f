"""The parts of an original checkpoint as a model of ours, every tensor accounted for."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from dp_lora.config.classes import class_names
from dp_lora.config.schema import Config, Ldm
from dp_lora.diffusion import make_scheduler
from dp_lora.errors import InputError
from dp_lora.models.agreement import check_schedule
from dp_lora.models.autoencoder import Vae, build_autoencoder, latent_size
from dp_lora.models.folder import Model
from dp_lora.models.importing.checkpoint import read_state_dict
from dp_lora.models.importing.keys import (
    ALPHAS_CUMPROD,
    BETAS,
    CLASS_EMBEDDING,
    EMA,
    HARMLESS,
    ema_key,
    first_stage_keys,
    unet_keys,
)
from dp_lora.models.info import model_info
from dp_lora.models.unet import build_unet

SHOWN = 12  # keys in one error line; the others are counted
TIMESTEPS = 1000
ALPHAS_TOLERANCE = 1e-5


class Networks(NamedTuple):
    """UNet, autoencoder and class embedding (rows, cross_attention_dim), float32, on the device of the state dict."""

    unet: UNet2DConditionModel
    vae: Vae
    class_embedding: Tensor


def import_model(path: Path, config: Config, sha256: str) -> Model:
    """The model in the checkpoint `path`, whose digest is `sha256`, built as `config` says.

    UNet and first stage from `config.ldm` and `config.autoencoder`; the schedule from the checkpoint's own betas, which
    must be those of `config.ldm`; classes `config.public.classes`, and a null row where the checkpoint has one row
    more. Raises InputError, one line, for whatever `read_state_dict` refuses, NaN or infinite weights, keys or shapes
    that do not account for every tensor, and a schedule that contradicts the config.
    """
    if config.ldm.prediction_type != "epsilon":
        raise InputError(
            f"ldm.prediction_type={config.ldm.prediction_type}: an original latent-diffusion checkpoint predicts the "
            "noise; set ldm.prediction_type=epsilon"
        )
    classes = class_names(config.public.classes)
    state = read_state_dict(path)
    try:
        check_finite(state)
        networks = import_networks(state, config)
        scheduler = import_scheduler(state, config.ldm)
        null_row = _null_row(networks.class_embedding, classes)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    info = model_info(
        classes=classes,
        null_row=null_row,
        size=config.public.size,
        channels=config.public.channels,
        prediction_type=config.ldm.prediction_type,
        trained_on={"source": config.public.source, "checkpoint": sha256, "ema": config.checkpoint.ema},
        privacy_status="public",
        seed=config.experiment.seed,
        sections={name: asdict(getattr(config, name)) for name in ("public", "autoencoder", "ldm")},
    )
    return Model(networks.unet, networks.vae, scheduler, networks.class_embedding, info)


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Raise InputError that names the first tensor with NaN or infinite values, ignored tensors excepted."""
    for key, tensor in state.items():
        if not HARMLESS.fullmatch(key) and not torch.isfinite(tensor).all():
            raise InputError(f"{key} holds NaN or infinite values; get the file again, or another one")


def import_networks(state: Mapping[str, Tensor], config: Config) -> Networks:
    """The networks of a state dict, built without weights of their own, so also of one on the meta device.

    The UNet's weights are the trained ones, or with `config.checkpoint.ema` their moving averages, which a checkpoint
    has for the UNet alone. The trained weights are the default, since the study fine-tunes them: its code loads the
    checkpoint into a model without EMA. The other set must be whole all the same. Raises InputError that lists the keys
    where one is missing, left over or of another shape: nothing is guessed, nothing is dropped.
    """
    with torch.device("meta"):
        vae = build_autoencoder(config.autoencoder, config.public.channels, config.public.size)
        unet = build_unet(config.ldm, config.autoencoder.latent_channels, latent_size(vae))
    unet_names, vae_names = unet_keys(unet), first_stage_keys(vae)
    has_ema = any(key.startswith(EMA) and not HARMLESS.fullmatch(key) for key in state)
    if config.checkpoint.ema and not has_ema:
        raise InputError("checkpoint.ema=true, but it holds no moving averages (model_ema.*); set checkpoint.ema=false")
    ema_names = {name: ema_key(key) for name, key in unet_names.items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for network, names in ((unet, unet_names), (unet, ema_names if has_ema else {}), (vae, vae_names)):
        tensors = network.state_dict()
        shapes |= {key: tuple(tensors[name].shape) for name, key in names.items()}
    _account(state, shapes)

    for network, names in ((unet, ema_names if config.checkpoint.ema else unet_names), (vae, vae_names)):
        own = network.state_dict()
        filled = {name: _fitted(state[key], own[name]) for name, key in names.items()}
        network.load_state_dict(filled, strict=True, assign=True)
        network.eval().requires_grad_(False)
    embedding = state[CLASS_EMBEDDING]
    if embedding.ndim != 2 or embedding.shape[1] != config.ldm.cross_attention_dim:
        raise InputError(
            f"{CLASS_EMBEDDING} has shape {tuple(embedding.shape)}, but ldm.cross_attention_dim="
            f"{config.ldm.cross_attention_dim}"
        )
    return Networks(unet, vae, embedding.detach().to(torch.float32))


def _account(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    wanted = {*shapes, CLASS_EMBEDDING, BETAS, ALPHAS_CUMPROD}
    missing = [key for key in [*shapes, CLASS_EMBEDDING, BETAS, ALPHAS_CUMPROD] if key not in state]
    left_over = [key for key in state if key not in wanted and not HARMLESS.fullmatch(key)]
    other = [
        f"{key} {tuple(state[key].shape)}, not {shape}"
        for key, shape in shapes.items()
        if key in state and not _fits(state[key], shape)
    ]
    problems = [
        f"{len(keys)} {problem}: {_listed(keys)}"
        for problem, keys in (("missing", missing), ("left over", left_over), ("of another shape", other))
        if keys
    ]
    if problems:
        raise InputError(
            f"the tensors are not those of the config's autoencoder and ldm: {'; '.join(problems)}; use the config "
            "that belongs to this checkpoint"
        )


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(keys[:SHOWN]) + more


def _fits(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    # the first stage's attention: 1x1 convolutions (c, c, 1, 1) there, linear layers (c, c) here
    return tensor.is_floating_point() and tuple(tensor.shape) in (shape, (*shape, 1, 1) if len(shape) == 2 else shape)


def _fitted(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32).reshape(like.shape).contiguous()


def _null_row(embedding: Tensor, classes: Sequence[str]) -> bool:
    if len(embedding) not in (len(classes), len(classes) + 1):
        raise InputError(
            f"{CLASS_EMBEDDING} has {len(embedding)} rows, but public.classes names {len(classes)} classes: must be "
            "one row per class, or one more for 'no class'"
        )
    return len(embedding) == len(classes) + 1


def import_scheduler(state: Mapping[str, Tensor], ldm: Ldm) -> DDIMScheduler:
    """DDIM with the checkpoint's own betas (1000,), the ones its model was trained with.

    Raises InputError where `ldm` names another schedule.
    """
    betas = state[BETAS].double()
    if betas.shape != (TIMESTEPS,):
        raise InputError(f"{BETAS} has shape {tuple(betas.shape)}, must be ({TIMESTEPS},)")
    check_schedule(ldm, betas, "its")
    own = betas.float().tolist()
    arguments = (ldm.beta_schedule, ldm.beta_start, ldm.beta_end, ldm.prediction_type, TIMESTEPS)
    scheduler = make_scheduler(*arguments, trained_betas=own)
    kept = state[ALPHAS_CUMPROD].float()
    if kept.shape != betas.shape or (scheduler.alphas_cumprod - kept).abs().max() > ALPHAS_TOLERANCE:
        raise InputError(f"{ALPHAS_CUMPROD} is not the cumulative product of 1 - {BETAS}; the file is damaged")
    return scheduler
