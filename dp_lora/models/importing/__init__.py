"""From an original latent-diffusion checkpoint (Rombach et al. 2022, CompVis code) to a model of ours."""

from dp_lora.models.importing.checkpoint import MODEL_FILE, find_checkpoint, read_state_dict
from dp_lora.models.importing.model import import_model

__all__ = ["MODEL_FILE", "find_checkpoint", "import_model", "read_state_dict"]
