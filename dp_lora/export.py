"""Export: base and adapter merged into one folder for stock diffusers, the adapter beside it for its own loaders.

Merging is post-processing of the release: the adapter's privacy.json holds for the merged weights.
"""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from dp_lora.config.schema import Sampling
from dp_lora.errors import InputError
from dp_lora.files import whole_folder, write_json
from dp_lora.models.adapters import adapter_info, apply_adapter, merge_lora
from dp_lora.models.families import ClassConditional
from dp_lora.models.folder import Model, save_model
from dp_lora.models.info import FORMAT
from dp_lora.models.pipeline_index import steps_and_guidance
from dp_lora.release import front_matter, loading_lines
from dp_lora.statement import read_privacy

ADAPTER = "adapter"  # subfolder with the adapter's own files
NOT_STOCK = (
    "Stock diffusers cannot build this UNet: its residual blocks halve and double the side. Its weights are here;"
)


def export(base: Model, adapter: Path, sampling: Sampling, out_folder: Path) -> bool:
    """Write the diffusers folder of `base` (changed in place) with an adapter, whole or not at all.

    Of a pipeline: its whole folder, the adapter merged into its denoiser, with the files of privacy and the adapter's
    that follow. Of a model folder of ours:

    `unet/` (merged, no PEFT layer left), `vae/`, `scheduler/`; `class_embedding.safetensors` ("weight": one row per
    class in model.json's order, then the null row where the base has one); model.json, privacy.json and README.md with
    an example that draws one image as `sampling` says; `adapter/`, a copy of the adapter. The folder is also a model
    folder of ours that states what was spent. Without privacy it is its owner's alone. Returns False where stock
    diffusers cannot build the UNet: its weights are written, the example is left out. Raises InputError for an adapter
    that is damaged or not finite.
    """
    statement, info = read_privacy(adapter), adapter_info(adapter)
    model = merged(apply_adapter(base, adapter))
    model = replace(model, info={**model.info, **_privacy_facts(statement), "merged_from": info["base"]})
    stock = model.pipeline is not None or is_stock(model.denoiser)
    with whole_folder(out_folder, private=not statement["private"]) as temporary:
        if model.pipeline is not None:
            if isinstance(model.family, ClassConditional):
                model.family.put_table(model.denoiser, model.embedded())
            model.pipeline.save_pretrained(temporary)
            write_json(temporary / "model.json", {"format": FORMAT, **model.info})
        else:
            save_model(temporary, model.denoiser, model.vae, model.scheduler, model.embedded(), model.info)
        write_json(temporary / "privacy.json", statement)
        (temporary / "README.md").write_text(_card(model, statement, sampling, stock), encoding="utf-8")
        shutil.copytree(adapter, temporary / ADAPTER)
    return stock


def _privacy_facts(statement: Mapping[str, Any]) -> dict[str, Any]:
    """The privacy fields of model.json, by which a fine-tuning from the exported folder adds the cost of this one."""
    if not statement["private"]:
        return {"privacy_status": "non-private"}
    names = ("epsilon", "delta", "unit", "relation")
    return {"privacy_status": "private-dp", "privacy": {name: statement[name] for name in names}}


def merged(model: Model) -> Model:
    """The model with LoRA's products added into the denoiser's weights (in place): stock layers, no PEFT layer left.

    The same function up to rounding. Raises InputError for weights that are not finite.
    """
    try:
        merge_lora(model.denoiser)
    except ValueError as error:
        raise InputError(f"the adapter cannot be merged: {' '.join(str(error).split())}") from None
    return model


def is_stock(unet: UNet2DConditionModel) -> bool:
    """Whether stock diffusers, given the UNet's config, builds the very layers that the UNet has."""
    with torch.device("meta"):
        stock = UNet2DConditionModel.from_config(dict(unet.config))
    return _shapes(stock) == _shapes(unet)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def example(model: Model, sampling: Sampling) -> str:
    """Python that draws one image of the first class from the exported folder, with diffusers and safetensors alone.

    It leaves the latents (1, c, h, w) as `latents` and the image (1, C, H, W) in [-1, 1] as `pixels`; the same noise
    given, they are those of `dp_lora.sampling` with sampling.attempts=1. Run it in the folder.
    """
    vae, side, channels = model.vae, model.denoiser.config["sample_size"], model.denoiser.config["in_channels"]
    kind = type(vae).__name__
    steps, scale = steps_and_guidance(sampling, model.family)
    if scale != 1 and model.null_row is not None:
        predict = """\
        null, wanted = unet(latents.repeat(2, 1, 1, 1), t, rows[[-1, row]].unsqueeze(1)).sample.chunk(2)
"""
        predicted = f"null + {scale!r} * (wanted - null)"
    else:
        predict, predicted = "", "unet(latents, t, rows[[row]].unsqueeze(1)).sample"
    scaling = vae.config["scaling_factor"]
    decoded = "latents" if scaling == 1 else f"latents / {scaling!r}"
    lines = []
    if vae.config.get("latents_mean") and vae.config.get("latents_std"):
        names = '("latents_mean", "latents_std")'
        lines = [f"    mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1) for name in {names})"]
        decoded = f"{decoded} * std + mean"
    lines.append(f"    pixels = vae.decode({decoded}).sample.clamp(-1, 1)")
    decode = "\n".join(lines)
    return f"""\
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, {kind}
from diffusers.image_processor import VaeImageProcessor
from safetensors.torch import load_file

row, noise = 0, torch.Generator().manual_seed(0)  # row 0 is the class {model.classes[0]!r}
unet, vae = UNet2DConditionModel.from_pretrained("unet"), {kind}.from_pretrained("vae")
scheduler, rows = DDIMScheduler.from_pretrained("scheduler"), load_file("class_embedding.safetensors")["weight"]
scheduler.set_timesteps({steps})
latents = torch.randn(1, {channels}, {side}, {side}, generator=noise)
with torch.inference_mode():
    for t in scheduler.timesteps:
{predict}\
        latents = scheduler.step({predicted}, t, latents, eta={sampling.eta!r}, generator=noise).prev_sample
{decode}
VaeImageProcessor().postprocess(pixels)[0].save("sample.png")
"""


def _card(model: Model, statement: Mapping[str, Any], sampling: Sampling, stock: bool) -> str:
    base = model.info["merged_from"]
    lines = front_matter("diffusers", "diffusers, differential-privacy", base)
    lines += ["# Latent diffusion model with a merged DP-LoRA adapter", "", f"**Privacy:** {statement['statement']}."]
    if statement["private"]:
        lines.append(
            "Merging is post-processing: the statement holds for these weights and for what is drawn from them."
        )
    lines += ["", f"**Base model:** `{base['path']}` (SHA-256 of the folder {base['digest']})."]
    if model.family.of_classes:
        null = ", then a last row for 'no class'" if model.null_row is not None else ""
        where = "class_embedding.safetensors" if model.pipeline is None else "the class table, from class_labels=[0] on"
        lines.append(f"**Rows of {where}:** {', '.join(model.classes)}{null}.")
    lines.append("")
    if model.pipeline is not None:
        lines += [
            "Load it, in this folder:",
            "",
            "```python",
            "from diffusers import DiffusionPipeline",
            "",
            'pipe = DiffusionPipeline.from_pretrained(".")',
            "```",
            "",
        ]
    elif stock:
        once = " (once: `sample` draws again where the model sees another class)" if sampling.attempts > 1 else ""
        lines += [f"Draw an image, in this folder{once}:", "", "```python", example(model, sampling) + "```", ""]
    else:
        lines += [f"{NOT_STOCK} `dp_lora.models.folder.load_model` reads the folder.", ""]
    loading = loading_lines(model, base, ADAPTER)
    lines += [f"The folder `{ADAPTER}` holds the adapter alone, for the base model:", "", *loading, ""]
    return "\n".join(lines)
