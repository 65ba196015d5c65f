"""Pipeline folders of diffusers as bases: whole, from safetensors and JSON alone; nothing is unpickled, nothing run."""

from pathlib import Path
from typing import Any

import torch

from dp_lora.errors import InputError, line
from dp_lora.models.families import Family
from dp_lora.models.pipeline_index import INDEX, LEFT_OUT, family_of, is_outline, part_config, read_index
from dp_lora.models.quiet import quiet_libraries


def load_pipeline(folder: Path, device: torch.device | str, precision: torch.dtype) -> tuple[Family, Any]:
    """Family and pipeline of a folder, on `device`, in evaluation mode and without gradients, in `precision`.

    Its autoencoder is float32 all the same: latents are encoded once, and some autoencoders overflow in less.
    Raises InputError, one line, where something is missing, damaged, or not safetensors.
    """
    import diffusers

    family = family_of(folder)
    part_config(folder, family.part)
    if is_outline(folder):
        raise InputError(f"{folder}: an outline of a pipeline, without weights; import_base downloads them")
    index = read_index(folder)
    foreign = sorted(
        name
        for name, where in index.items()
        if isinstance(where, list) and where[0] not in ("diffusers", "transformers", None) and name not in LEFT_OUT
    )
    if foreign:
        raise InputError(f"{folder / INDEX}: {', '.join(foreign)}: brings code of its own, which is not run")
    absent: dict[str, Any] = {name: None for name in LEFT_OUT if name in index}
    if "requires_safety_checker" in index:
        absent["requires_safety_checker"] = False
    try:
        kind = getattr(diffusers, family.pipeline)
        with quiet_libraries():
            pipe = kind.from_pretrained(
                str(folder),
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,
                dtype={"default": precision, "vae": torch.float32},
                **absent,
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
        raise InputError(f"{folder}: cannot be read ({line(error)})") from None
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
            if name != "vae" and component.dtype != precision:
                # diffusers keeps some classes' precision, and its own `to` warns of parts that none has
                torch.nn.Module.to(component, precision)
    return family, pipe


def text_encoders(pipe: Any) -> list[torch.nn.Module]:
    """The networks that turn captions into the denoiser's conditions, in the order of their names."""
    return [
        part for name, part in sorted(pipe.components.items()) if name.startswith("text_encoder") and part is not None
    ]
