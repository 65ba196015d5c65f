"""LoRA (Hu et al. 2022) on the UNet's attention, by PEFT; per-unit copies of its weights; the adapter's files.

PEFT makes, names and stores the adapter. Its inner linear layers are replaced by `UnitLinear`, which computes each row
with the copy of its unit when copies are given; the state dict stays PEFT's own.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dp_lora.config.prompts import drawn_prompts
from dp_lora.config.schema import Config, Lora
from dp_lora.errors import InputError
from dp_lora.files import read_json, write_json
from dp_lora.models.embedding_start import start_positions
from dp_lora.models.families import CLASSES, Family
from dp_lora.models.folder import Denoiser, Model
from dp_lora.models.info import FORMAT, load_info
from dp_lora.models.meta import tensor_shapes
from dp_lora.models.targets import adapted_ranks

ADAPTER = "default"
WEIGHTS = "pytorch_lora_weights.safetensors"
EMBEDDING = "class_embedding.weight"


class UnitLinear(nn.Linear):
    """A linear layer without bias; each row may use its unit's copy of the weights.

    `unit_weight`: None, or copies (P, out, in) and a number of rows R: the rows of the input (R, ..., in) use the
    copies in equal shares, the first R / P rows the first copy.
    """

    unit_weight: tuple[Tensor, int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.unit_weight is None:
            return nn.functional.linear(x, self.weight.to(x.dtype))
        copies, rows = self.unit_weight
        if x.ndim < 2 or len(x) != rows:
            # a layer that sees all rows as one list would give each unit the others' gradient
            raise InputError(
                f"lora.targets: a layer is given an input of shape {tuple(x.shape)} for {rows} rows, which cannot be "
                "told apart in it; leave its name out of lora.targets"
            )
        weight = copies.to(x.dtype)
        if len(weight) < rows:
            # the rows of a copy, one after the other, are one longer row
            together = torch.bmm(x.reshape(len(weight), -1, x.shape[-1]), weight.transpose(1, 2))
            return together.reshape(*x.shape[:-1], -1)
        # the copies first: their gradient then comes out contiguous
        each = torch.bmm(weight, x.reshape(rows, -1, x.shape[-1]).transpose(1, 2)).transpose(1, 2)
        return each.reshape(*x.shape[:-1], -1)


def add_lora(denoiser: Denoiser, settings: Lora, generator: torch.Generator, family: Family = CLASSES) -> LoraConfig:
    """Give `denoiser` a LoRA adapter: the base frozen, B = 0, A at a seeded random start; alpha None is alpha = rank.

    A ~ N(0, 1 / in_features): rows of about unit norm. With a rank_schedule (see `layer_ranks`) the ranks are made so
    before anything is trained, and each layer's alpha is its rank: the scaling stays 1. Raises InputError for a target
    without a match.
    """
    rank = settings.rank
    ranks = adapted_ranks(tensor_shapes(denoiser), settings, family)
    denoiser.requires_grad_(False)
    others = {name: layer_rank for name, layer_rank in ranks.items() if layer_rank != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=settings.alpha or rank,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=list(ranks),
        bias="none",  # PEFT's lora_only would train the base's own biases
        lora_dropout=0.0,
    )
    inject_adapter_in_model(config, denoiser, adapter_name=ADAPTER)
    # diffusers' own add_adapter sets this flag; transformers of some families have no such method
    denoiser._hf_peft_config_loaded = True
    denoiser.peft_config = {ADAPTER: config}
    for layer in _lora_layers(denoiser).values():
        # PEFT would keep a float32 copy of every input of a layer that is held in bfloat16
        layer.cast_input_dtype_enabled = False
        for factors in (layer.lora_A, layer.lora_B):
            factors[ADAPTER] = _unit_linear(cast(nn.Linear, factors[ADAPTER]))
    with torch.no_grad():
        for name, linear in _factors(denoiser).items():
            if name.endswith(".lora_A"):
                start = torch.randn(linear.weight.shape, generator=generator) / math.sqrt(linear.in_features)
                linear.weight.copy_(start)
            else:
                linear.weight.zero_()
    return config


def _unit_linear(linear: nn.Linear) -> UnitLinear:
    layer = UnitLinear(linear.in_features, linear.out_features, bias=False, device="meta")
    # PEFT makes them in the precision of their base layer; trained weights are float32
    layer.weight = nn.Parameter(linear.weight.detach().float())
    return layer


def _lora_layers(denoiser: Denoiser) -> dict[str, LoraLinear]:
    return {name: module for name, module in denoiser.named_modules() if isinstance(module, LoraLinear)}


def _factors(denoiser: Denoiser) -> dict[str, UnitLinear]:
    """Every LoRA factor by name, such as `down_blocks.1...attn1.to_q.lora_B`."""
    found = {}
    for name, layer in _lora_layers(denoiser).items():
        found[f"{name}.lora_A"] = cast(UnitLinear, layer.lora_A[ADAPTER])
        found[f"{name}.lora_B"] = cast(UnitLinear, layer.lora_B[ADAPTER])
    return found


def lora_parameters(denoiser: Denoiser, train: str) -> dict[str, Tensor]:
    """The trained LoRA weights by name, such as `down_blocks.1...attn1.to_q.lora_B`; `train`: AB, or B alone."""
    return {
        name: linear.weight for name, linear in _factors(denoiser).items() if train == "AB" or name.endswith(".lora_B")
    }


def unit_copies(denoiser: Denoiser, copies: Mapping[str, Tensor], rows: int) -> AbstractContextManager[None]:
    """Inside, a batch of `rows` uses `copies` instead of the LoRA weights of those names, as `UnitLinear` says."""
    return _placed([(linear, (copies[name], rows)) for name, linear in _factors(denoiser).items() if name in copies])


@contextmanager
def _placed(weights: Sequence[tuple[UnitLinear, tuple[Tensor, int] | None]]) -> Iterator[None]:
    before = [(linear, linear.unit_weight) for linear, _ in weights]
    try:
        for linear, weight in weights:
            linear.unit_weight = weight
        yield
    finally:
        for linear, weight in before:
            linear.unit_weight = weight


def use_checkpointing(denoiser: Denoiser) -> None:
    """Keep no activations of the blocks: the backward pass computes each block's anew, with the forward's own copies.

    That takes about 45% longer, and a fraction of the memory. Plain checkpointing would compute them with the weights
    in place during the backward pass, when the copies are gone.
    """

    def checkpointed(block: Any, *arguments: Any) -> Any:
        now = [(linear, linear.unit_weight) for linear in _factors(denoiser).values()]
        return checkpoint(block, *arguments, use_reentrant=False, context_fn=lambda: (nullcontext(), _placed(now)))

    denoiser.enable_gradient_checkpointing(checkpointed)


def untrained_class_embedding(model: Model, start: str, n_classes: int, noise: float, seed: int) -> Tensor:
    """A fresh class embedding (n_classes, dim): `start` (train.embedding_start) + noise * N(0, 1).

    `start`: mean of the base's classes, zero, or a class of the base for each row, commas between.
    Raises InputError as `start_positions`.
    """
    rows = model.embedded()[: len(model.classes)]
    positions = start_positions(start, model.classes, n_classes)
    if positions is not None:
        begin = rows[positions]
    elif start == "mean":
        begin = rows.mean(0)
    else:
        begin = torch.zeros_like(rows[0])
    generator = torch.Generator().manual_seed(seed)
    return begin + noise * torch.randn(n_classes, rows.shape[1], generator=generator).to(rows)


def with_embedding(model: Model, embedding: Tensor | None, classes: Sequence[str]) -> Model:
    """The model that draws `classes`, with `embedding` (classes, dim) instead of its own; its null row stays last.

    For a base of captions `classes` are prompts, and `embedding` is None.
    """
    if embedding is None:
        return replace(model, info={**model.info, "classes": list(classes)})
    rows = embedding.detach().to(model.embedded())
    if model.null_row is not None:
        rows = torch.cat([rows, model.null_row[None]])
    return replace(model, class_embedding=rows, info={**model.info, "classes": list(classes)})


def drawn_of(config: Config, model: Model) -> list[str]:
    """The subjects of drawn pictures: the classes, or for a base of captions the public prompts."""
    return list(config.data.classes) if model.family.of_classes else drawn_prompts(config)


def ready_to_draw(model: Model, config: Config) -> Model:
    """The model ready to draw for `config`: a base of captions in the pictures' size, with the public prompts."""
    if model.family.of_classes:
        return model
    return replace(model, info={**model.info, "size": config.data.size, "classes": drawn_prompts(config)})


@dataclass(frozen=True)
class Adapter:
    """The result of private fine-tuning: LoRA weights on a denoiser, and one embedding row per class if it has classes.

    `dead`: names of LoRA weights that get no gradient whatever the pictures are; they are not trained.
    """

    denoiser: Denoiser
    lora: LoraConfig
    embedding: Tensor | None
    family: Family = CLASSES
    dead: frozenset[str] = frozenset()

    def parameters(self, train: str) -> dict[str, Tensor]:
        """All trained tensors by name; the embedding is among them."""
        alive = {
            name: weight for name, weight in lora_parameters(self.denoiser, train).items() if name not in self.dead
        }
        return alive if self.embedding is None else {**alive, EMBEDDING: self.embedding}


def save_adapter(
    folder: Path,
    adapter: Adapter,
    classes: Sequence[str],
    base: Mapping[str, Any],
    trained_on: Mapping[str, Any],
    privacy_status: str,
) -> None:
    """Write the adapter into an existing folder: for diffusers, for PEFT, and the class embedding where there is one.

    diffusers: `unet.load_lora_adapter(folder, weight_name="pytorch_lora_weights.safetensors", prefix=None)`, or of a
    pipeline `pipe.load_lora_weights(folder)`.
    PEFT: `PeftModel.from_pretrained(unet, folder / "peft")`. `base` names the base model (path, digest; of the Hub also
    hub and revision), `trained_on` the private source as the config does, `privacy_status` is one of PRIVACY_STATUSES.
    """
    lora = replace(adapter.lora, inference_mode=True)
    for made in (lora, adapter.denoiser.peft_config[ADAPTER]):
        # PEFT keeps a set, whose order changes from process to process: equal adapters would be unequal files
        made.target_modules = sorted(made.target_modules or [])
    peft = folder / "peft"
    peft.mkdir()
    state = get_peft_model_state_dict(adapter.denoiser, adapter_name=ADAPTER)
    _save_for_diffusers(folder, adapter, state)
    save_file(
        {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in state.items()},
        peft / "adapter_model.safetensors",
    )
    lora.save_pretrained(str(peft))
    if adapter.embedding is not None:
        save_file({"weight": adapter.embedding.detach().cpu().contiguous()}, folder / "class_embedding.safetensors")
    facts = {"trained_on": dict(trained_on), "privacy_status": privacy_status, "rank": adapter.lora.r}
    write_json(folder / "model.json", {"format": FORMAT, "classes": list(classes), "base": dict(base), **facts})


def _save_for_diffusers(folder: Path, adapter: Adapter, state: Mapping[str, Tensor]) -> None:
    family = adapter.family
    if family.by_pipeline:
        import diffusers

        # keys with the component's prefix, as `load_lora_weights` and other programs look for them
        kind = getattr(diffusers, family.pipeline)
        kind.save_lora_weights(folder, **{f"{family.part}_lora_layers": dict(state)}, safe_serialization=True)
    elif not family.pipeline:
        adapter.denoiser.save_lora_adapter(folder, adapter_name=ADAPTER, weight_name=WEIGHTS, safe_serialization=True)
    if (folder / WEIGHTS).exists():
        _sort_header(folder / WEIGHTS)


def _sort_header(path: Path) -> None:
    """Put a safetensors file's metadata in order: its writer's order changes from process to process."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])


def _put_on(denoiser: Denoiser, folder: Path) -> None:
    """Put PEFT's adapter of `folder` on a denoiser, which needs no loader of its own."""
    config = LoraConfig.from_pretrained(str(folder))
    state = load_file(folder / "adapter_model.safetensors")
    inject_adapter_in_model(config, denoiser, adapter_name=ADAPTER)
    own = {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}
    found: Any = set_peft_model_state_dict(denoiser, own, adapter_name=ADAPTER)
    if found.unexpected_keys:
        raise ValueError("the adapter is another base's")
    denoiser.to(next(denoiser.parameters()).device).eval().requires_grad_(False)


def merge_lora(denoiser: Denoiser) -> None:
    """Add LoRA's products into their base layers (in place), and remove PEFT's layers.

    Raises ValueError for weights that are not finite.
    """
    for layer in _lora_layers(denoiser).values():
        layer.merge(safe_merge=True)
    remove_lora(denoiser)


def remove_lora(denoiser: Denoiser) -> None:
    """Remove PEFT's layers (in place): the denoiser is its base again."""
    for name, layer in _lora_layers(denoiser).items():
        above, _, own = name.rpartition(".")
        setattr(denoiser.get_submodule(above), own, layer.get_base_layer())
    denoiser._hf_peft_config_loaded = False
    del denoiser.peft_config


def adapter_info(folder: Path) -> dict[str, Any]:
    """model.json of an adapter folder: classes, base (path and digest), rank."""
    info = load_info(folder)
    if "base" not in info:
        raise InputError(f"{folder}: holds a base model, not an adapter; name a release/ or not-private/ folder")
    return info


def apply_adapter(model: Model, folder: Path) -> Model:
    """The base `model` with the adapter of `folder` on its denoiser (in place) and the adapter's classes."""
    info = adapter_info(folder)
    embedding = None
    try:
        config = read_json(folder / "peft" / "adapter_config.json")
        if model.family.of_classes:
            embedding = load_file(folder / "class_embedding.safetensors")["weight"]
        if model.pipeline is None:
            model.denoiser.load_lora_adapter(str(folder), weight_name=WEIGHTS, prefix=None, adapter_name=ADAPTER)
        else:
            _put_on(model.denoiser, folder / "peft")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"{folder}: the adapter cannot be read: {' '.join(str(error).split())}") from None
    if config["r"] != info["rank"]:
        raise InputError(f"{folder}: model.json says rank {info['rank']}, adapter_config.json {config['r']}")
    return with_embedding(model, embedding, info["classes"])
