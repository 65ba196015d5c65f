"""Images from a model: DDIM with classifier-free guidance, noise keyed by (seed, class, index), folders of samples."""

from dp_lora.sampling.ddim import draw, draw_in_batches, draw_pixels
from dp_lora.sampling.folder import SPLIT, assist, balanced, model_fingerprint, sample, write_class_grid

__all__ = [
    "SPLIT",
    "assist",
    "balanced",
    "draw",
    "draw_in_batches",
    "draw_pixels",
    "model_fingerprint",
    "sample",
    "write_class_grid",
]
