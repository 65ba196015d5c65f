"""The networks of a base on the meta device: layers without weights, to read names, shapes and operations off."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from dp_lora.config.schema import Config
from dp_lora.errors import InputError
from dp_lora.models.attention import use_one_token_attention
from dp_lora.models.autoencoder import VAE_CLASSES, Vae, build_autoencoder, latent_size
from dp_lora.models.families import TEXT, ClassConditional, Conditions, Family
from dp_lora.models.info import part_kind
from dp_lora.models.pipeline_index import family_of, is_pipeline, part_config
from dp_lora.models.unet import UNET_CLASSES, build_unet


def meta_networks(config: Config, base: Path) -> tuple[Any, Any]:
    """Denoiser and autoencoder as the base's folder has them; a missing part as `config` would build it.

    InputError where the config's numbers do not fit together, or a part of the folder is of another kind.
    """
    if is_pipeline(base):
        family = family_of(base)
        with torch.device("meta"):
            denoiser, first_stage = (_of_diffusers(part_config(base, part)) for part in (family.part, "vae"))
        if isinstance(family, ClassConditional):
            family.take_table(denoiser, 0)
        return denoiser, first_stage
    with torch.device("meta"):
        vae: Any = _stored(base / "vae", VAE_CLASSES)
        if vae is None:
            vae = build_autoencoder(config.autoencoder, config.public.channels, config.public.size)
        unet: Any = _stored(base / "unet", UNET_CLASSES)
        if unet is None:
            side = latent_size(build_autoencoder(config.autoencoder, config.public.channels, config.public.size))
            unet = build_unet(config.ldm, config.autoencoder.latent_channels, side)
    use_one_token_attention(unet)
    return unet, vae


def meta_row(
    denoiser: Any, family: Family, size: int, latent: tuple[int, int, int], precision: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Conditions]:
    """What `family.predict` takes for one row: a latent of shape `latent`, a time, what a picture of `size` is of."""
    with torch.device("meta"):
        x_t = torch.empty(1, *latent, dtype=precision)
        t = torch.empty(1) if family.flow else torch.empty(1, dtype=torch.int64)
    blank = family.blank(denoiser.config, size)
    return x_t, t, {name: tensor.to("meta", precision if name in TEXT else None) for name, tensor in blank.items()}


def _of_diffusers(config: dict[str, Any]) -> Any:
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if kind is None:
        raise InputError(f"{config.get('_class_name')}: diffusers has no such class; the base needs another version")
    return kind.from_config(config)


def _stored(folder: Path, kinds: Sequence[type]) -> Any:
    if not (folder / "config.json").exists():
        return None
    name, settings = part_kind(folder, [kind.__name__ for kind in kinds])
    kind: Any = {kind.__name__: kind for kind in kinds}[name]
    return kind.from_config(settings)


def meta_copies(unet: UNet2DConditionModel, vae: Vae) -> tuple[UNet2DConditionModel, Vae]:
    """The same networks on the meta device; neither is touched."""
    with torch.device("meta"):
        copied: Any = [type(network).from_config(network.config) for network in (unet, vae)]
    use_one_token_attention(copied[0])
    return copied[0], copied[1]


def tensor_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a file of the network's weights would hold."""
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
