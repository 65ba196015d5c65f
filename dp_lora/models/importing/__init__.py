"""From an original latent-diffusion checkpoint (Rombach et al. 2022, CompVis code) to a model of ours."""

from dp_lora.models.importing.checkpoint import read_state_dict
from dp_lora.models.importing.model import import_model

__all__ = ["import_model", "read_state_dict"]
