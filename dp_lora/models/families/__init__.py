"""The kinds of base that can be fine-tuned, one small module each; docs/bases.md says how to add one."""

from dp_lora.models.families.classes import ClassConditional
from dp_lora.models.families.dit import DiT
from dp_lora.models.families.family import TEXT, Conditions, Family
from dp_lora.models.families.flux import Flux
from dp_lora.models.families.pixart import PixArt
from dp_lora.models.families.sana import Sana
from dp_lora.models.families.sd3 import StableDiffusion3
from dp_lora.models.families.sdxl import StableDiffusionXL

UNBINNED = {"use_resolution_binning": False, "clean_caption": False}  # draw the very size; take prompts as they are
CLASSES = ClassConditional()
FAMILIES = {
    family.pipeline: family
    for family in (
        Family("StableDiffusionPipeline"),
        StableDiffusionXL("StableDiffusionXLPipeline"),
        StableDiffusion3("StableDiffusion3Pipeline"),
        Flux("FluxPipeline"),
        PixArt("PixArtAlphaPipeline", tokens=120, call=UNBINNED),
        PixArt("PixArtSigmaPipeline", tokens=300, call=UNBINNED),
        Sana("SanaPipeline", call={**UNBINNED, "complex_human_instruction": None}),
        DiT("DiTPipeline"),
    )
}

__all__ = ["CLASSES", "FAMILIES", "TEXT", "ClassConditional", "Conditions", "Family"]
