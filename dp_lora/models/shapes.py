"""Names and shapes of a base's tensors: from its files if it exists, else from the networks that a config would make.

They are in the header of a file of tensors, so an existing base is counted without torch; so is one that a shipped
config would make.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dp_lora.config.classes import class_names
from dp_lora.config.schema import Config
from dp_lora.errors import InputError, line
from dp_lora.models.families import CLASSES, FAMILIES, Family
from dp_lora.models.info import UNETS, VAES, load_info, part_kind
from dp_lora.models.pipeline_index import family_of, is_pipeline, part_config
from dp_lora.models.shipped import counted_before

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class BaseShapes:
    """The shapes by which a fine-tuning is counted."""

    denoiser: Shapes  # by tensor, such as "conv_in.weight"
    vae: Shapes
    context: int  # width of a class's row in the class embedding; 0: the base has none
    classes: int
    family: Family = CLASSES


def base_shapes(config: Config, base: Path) -> BaseShapes:
    """Those of the base in `base`; missing parts as `config` would build them.

    InputError for a part that is of another kind or has no weights, and where the config's numbers do not fit together.
    """
    if is_pipeline(base):
        family, classes = family_of(base), load_info(base)["classes"]
        width = family.width(part_config(base, family.part)) if family.of_classes else 0
        return BaseShapes(part_shapes(base / family.part), part_shapes(base / "vae"), width, len(classes), family)
    denoiser, vae = _stored(base / "unet", UNETS), _stored(base / "vae", VAES)
    context = config.ldm.cross_attention_dim
    if denoiser is None and vae is None and (before := counted_before(config)) is not None:
        denoiser, vae = before.denoiser, before.vae
    elif denoiser is not None:
        context = part_kind(base / "unet", UNETS)[1]["cross_attention_dim"]
    if denoiser is None or vae is None:
        from dp_lora.models.meta import (  # torch and diffusers: seconds
            meta_networks,
            tensor_shapes,
        )

        made = [tensor_shapes(network) for network in meta_networks(config, base)]
        denoiser, vae = denoiser or made[0], vae or made[1]
        if config.ldm.text_encoder is not None:
            return BaseShapes(denoiser, vae, 0, 0, FAMILIES["StableDiffusionPipeline"])
    stated = (base / "model.json").exists()
    classes = load_info(base)["classes"] if stated else class_names(config.public.classes)
    return BaseShapes(denoiser, vae, context, len(classes))


def _stored(folder: Path, kinds: Sequence[str]) -> Shapes | None:
    """Shapes from the files of a part; None where the part is missing."""
    if not (folder / "config.json").exists():
        return None
    part_kind(folder, kinds)
    return part_shapes(folder)


def part_shapes(folder: Path) -> Shapes:
    """Names and shapes of the tensors in the files of a part. InputError where it has none, or they are damaged."""
    found: dict[str, tuple[int, ...]] = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "numpy") as tensors:
                found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder}: cannot be read ({line(error)})") from None
    if not found:
        raise InputError(f"{folder}: holds no *.safetensors; the model folder is not complete")
    return found
