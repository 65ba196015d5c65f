"""A model as a folder: `unet/`, `vae/`, `scheduler/` in diffusers' layout, `class_embedding.safetensors`, `model.json`.

An autoencoder folder holds `vae/` and `model.json` alone. Only safetensors and JSON: nothing is unpickled.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dp_lora.errors import InputError, line
from dp_lora.files import whole_folder, write_json
from dp_lora.models.attention import use_one_token_attention
from dp_lora.models.autoencoder import VAE_CLASSES, Vae, shrinks
from dp_lora.models.families import CLASSES, TEXT, ClassConditional, Conditions, Family
from dp_lora.models.info import load_info, part_kind
from dp_lora.models.operations import FILE, Operations
from dp_lora.models.pipeline_index import is_pipeline
from dp_lora.models.pipelines import load_pipeline
from dp_lora.models.unet import UNET_CLASSES

Part = TypeVar("Part", bound=ConfigMixin)
# a UNet of diffusers, or a pipeline's transformer: diffusers' classes have no common type for the members they share
Denoiser = Any


@dataclass(frozen=True)
class Model:
    """A latent diffusion model, in evaluation mode and without gradients.

    `denoiser` is a UNet; of some pipelines it is a transformer. `class_embedding` (classes [+ 1], dim): one row per
    entry of info["classes"], then the null row when info["null_row"]; None for a base that is conditioned on captions.
    `info` is model.json, or its equivalent.
    """

    denoiser: Denoiser
    vae: Any
    scheduler: Any
    class_embedding: Tensor | None
    info: dict[str, Any]
    family: Family = CLASSES
    pipeline: Any = None  # the pipeline of diffusers that the parts are of; None for a model folder of ours
    precision: torch.dtype = torch.float32  # of the frozen denoiser; adapters on it are float32

    @property
    def classes(self) -> list[str]:
        """The subjects of drawn pictures: class names, or public prompts for a pipeline."""
        return self.info["classes"]

    @property
    def null_row(self) -> Tensor | None:
        """Embedding of 'no class' (cross_attention_dim,), or None for a model trained without class dropout."""
        return self.embedded()[-1] if self.info["null_row"] else None

    def embedded(self) -> Tensor:
        """The class embedding of a class-conditional model."""
        assert self.class_embedding is not None, "a base of captions has no class embedding"
        return self.class_embedding

    def predict(self, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """`Family.predict`, with inputs in the denoiser's precision; its result is float32 for the loss."""
        given = {name: tensor.to(self.precision) if name in TEXT else tensor for name, tensor in conditions.items()}
        return self.family.predict(self.denoiser, x_t.to(self.precision), t, given).float()

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """(c, h, w) of the latent of a picture of `size` pixels."""
        side = size // shrinks(self.vae)
        return self.vae.config["latent_channels"], side, side


def save_model(
    folder: Path,
    unet: UNet2DConditionModel,
    vae: Vae,
    scheduler: DDIMScheduler,
    class_embedding: Tensor,
    info: dict[str, Any],
    extra: Sequence[Path] = (),
    operations: Operations | None = None,
) -> None:
    """Write a model folder, whole or not at all; a folder that stands there is replaced; `extra` files go in.

    A dry run estimates by a base's `operations`; without them it has to build the networks.
    """
    _check_embedding(class_embedding, unet, info, "class embedding")
    with whole_folder(Path(folder)) as temporary:
        _save_part(unet, temporary / "unet")
        _save_part(vae, temporary / "vae")
        _save_part(scheduler, temporary / "scheduler")
        weight = class_embedding.detach().to("cpu", torch.float32).contiguous()
        save_file({"weight": weight}, temporary / "class_embedding.safetensors")
        write_json(temporary / "model.json", info)
        if operations is not None:
            write_json(temporary / FILE, asdict(operations))
        for path in extra:
            shutil.copyfile(path, temporary / path.name)


def save_pipeline(
    folder: Path, pipe: Any, info: dict[str, Any], extra: Sequence[Path] = (), operations: Operations | None = None
) -> None:
    """Write a pipeline of diffusers with a model.json of ours, as `save_model` does."""
    pipe.vae.register_to_config(_name_or_path="")
    with whole_folder(Path(folder)) as temporary:
        pipe.save_pretrained(temporary, safe_serialization=True)
        write_json(temporary / "model.json", info)
        if operations is not None:
            write_json(temporary / FILE, asdict(operations))
        for path in extra:
            shutil.copyfile(path, temporary / path.name)


def save_autoencoder(folder: Path, vae: Vae, info: dict[str, Any], extra: Sequence[Path] = ()) -> None:
    """Write an autoencoder folder, as `save_model` does."""
    with whole_folder(Path(folder)) as temporary:
        _save_part(vae, temporary / "vae")
        write_json(temporary / "model.json", info)
        for path in extra:
            shutil.copyfile(path, temporary / path.name)


def _save_part(part: Vae | UNet2DConditionModel | DDIMScheduler, folder: Path) -> None:
    # a loaded part remembers the path of its folder, which must not be saved with it
    part.register_to_config(_name_or_path="")
    part.save_pretrained(folder)


def load_model(folder: Path, device: torch.device | str = "cpu", precision: torch.dtype = torch.float32) -> Model:
    """Read a model folder, or a pipeline's, whose denoiser and text encoders are then held in `precision`.

    A folder of ours is held in float32: it is small, and autocast gives it its precision. Raises InputError, one line,
    where it is missing, damaged or does not fit together.
    """
    folder = Path(folder)
    info = load_info(folder)
    if is_pipeline(folder):
        family, pipe = load_pipeline(folder, device, precision)
        denoiser, table = getattr(pipe, family.part), None
        if isinstance(family, ClassConditional):
            table = family.take_table(denoiser, len(info["classes"])).float()
        return Model(denoiser, pipe.vae, pipe.scheduler, table, info, family, pipe, precision)
    embedding_file = folder / "class_embedding.safetensors"
    try:
        # training starts from it: in half precision a step's sum and noise would be rounded to 8 bits
        embedding = load_file(embedding_file)["weight"].to(device, torch.float32)
    except (OSError, KeyError, SafetensorError) as error:
        raise InputError(f"{embedding_file}: cannot be read ({line(error)}); make the model folder again") from None
    unet = _load_part(UNET_CLASSES, folder / "unet").to(device).eval().requires_grad_(False)
    use_one_token_attention(unet)
    _check_embedding(embedding, unet, info, str(embedding_file))
    return Model(unet, load_vae(folder, device), _load_part((DDIMScheduler,), folder / "scheduler"), embedding, info)


def load_vae(folder: Path, device: torch.device | str = "cpu") -> Vae:
    """The autoencoder of a model or autoencoder folder, in evaluation mode and without gradients."""
    return _load_part(VAE_CLASSES, Path(folder) / "vae").to(device).eval().requires_grad_(False)


def _check_embedding(embedding: Tensor, unet: UNet2DConditionModel, info: dict[str, Any], where: str) -> None:
    rows, dim = len(info["classes"]) + bool(info["null_row"]), unet.config["cross_attention_dim"]
    if embedding.shape != (rows, dim):
        raise InputError(f"{where}: has shape {tuple(embedding.shape)}, but ({rows}, {dim}) belongs to this model")


def _load_part(kinds: Sequence[type[Part]], folder: Path) -> Part:
    # checked here: diffusers takes a missing folder for the name of a repository on the internet
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; the model folder is not complete")
    scheduler = DDIMScheduler in kinds
    options: dict[str, Any] = {} if scheduler else {"use_safetensors": True, "low_cpu_mem_usage": False}
    try:
        name, _ = part_kind(
            folder, [kind.__name__ for kind in kinds], "scheduler_config.json" if scheduler else "config.json"
        )
        kind: Any = {kind.__name__: kind for kind in kinds}[name]
        part = kind.from_pretrained(str(folder), local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder}: cannot be read ({line(error)})") from None
    return cast(Part, part)


def module_digest(module: Any) -> str:
    """SHA-256 over a network's weights and config, wherever it lies and whichever library version wrote it."""
    total = hashlib.sha256()
    # a network of transformers, a caption's encoder, has a config of another kind
    found = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    config = {key: value for key, value in found.items() if not key.startswith("_")}
    total.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        array = tensor.detach().cpu().contiguous()
        total.update(f"\0{name}\0{array.dtype}\0{tuple(array.shape)}\0".encode())
        total.update(array.view(torch.uint8).numpy().tobytes() if array.ndim else array.numpy().tobytes())
    return total.hexdigest()
