"""LPIPS (Zhang et al. 2018) on VGG features, from weights that are at hand; nothing is downloaded."""

from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from dp_lora.errors import InputError

VGG_FILE = "vgg16-397923af.pth"
VGG_URL = f"https://download.pytorch.org/models/{VGG_FILE}"
MIN_SIZE = 16  # VGG halves the side four times


class Perceptual:
    """The distance as a function; not a module, so that no checkpoint carries VGG's weights.

    Raises InputError where VGG's weights are missing or the pictures are too small.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        path = Path(torch.hub.get_dir()) / "checkpoints" / VGG_FILE
        if not path.is_file():
            raise InputError(
                f"autoencoder.lpips_weight: LPIPS needs VGG's weights, which are not at hand; fetch {VGG_URL} "
                f"to {path}, or set autoencoder.lpips_weight=0"
            )
        if size < MIN_SIZE:
            raise InputError(
                f"autoencoder.lpips_weight: LPIPS needs pictures of at least {MIN_SIZE} pixels, not {size}"
            )
        # only the network inside: the metric refuses reconstructions that leave [-1, 1]
        self.net = LearnedPerceptualImagePatchSimilarity(net_type="vgg").net.to(device).requires_grad_(False)

    def __call__(self, pixels: Tensor, other: Tensor) -> Tensor:
        """Mean LPIPS of two batches (N, C, H, W), C 1 or 3, about [-1, 1]; a scalar with gradient."""
        return self.net(pixels.expand(-1, 3, -1, -1), other.expand(-1, 3, -1, -1)).mean()
