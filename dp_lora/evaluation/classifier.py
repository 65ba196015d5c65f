"""A small convolutional classifier: the measure of utility, and the source of letter features."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dp_lora.data.pixels import to_pixels
from dp_lora.errors import InputError
from dp_lora.files import whole_file
from dp_lora.learning_rate import lr_factor
from dp_lora.progress import progress

BATCH_SIZE = 128
PREDICTED_AT_ONCE = 500
LR = 3e-3
LABEL_SMOOTHING = 0.1
DROPOUT = 0.3
WIDTHS = (24, 48, 96)
FEATURES = 96
# largest change of an augmented image: degrees, share of the size, shear, share of the width
ROTATION, SCALE, SHEAR, SHIFT = 12.0, 0.15, 0.2, 0.08


class Classifier(nn.Module):
    """Three blocks of convolution, pooling, batch norm and ReLU; (rows, C, H, W) in [-1, 1], any H and W from 8 up."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.channels = channels
        blocks: list[nn.Module] = []
        for before, after in zip((channels, *WIDTHS), WIDTHS, strict=False):
            # pooling before batch norm and ReLU: a quarter of their work
            blocks += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.MaxPool2d(2)]
            blocks += [nn.BatchNorm2d(after), nn.ReLU()]
        # a fixed 4x4 keeps a stroke's place and takes images of any size
        self.body = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.project = nn.Linear(WIDTHS[-1] * 16, FEATURES)
        self.head = nn.Linear(FEATURES, classes)
        self.to(memory_format=torch.channels_last)  # half the time on a CPU

    def features(self, pixels: Tensor) -> Tensor:
        """Penultimate activations (rows, 96)."""
        return F.relu(self.project(self.body(pixels)))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (rows, classes) and features (rows, 96)."""
        features = self.features(pixels)
        return self.head(features), features


@dataclass(frozen=True)
class ClassifierTraining:
    """Everything that determines a trained classifier, except its images."""

    steps: int
    seed: int

    def facts(self) -> dict[str, object]:
        """JSON-able, for the key of a cached result, which holds the code too."""
        return {**asdict(self), "torch": torch.__version__}


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate, scale, shear and shift each image by its own random amounts; (rows, C, H, W) -> the same shape."""
    rows = len(pixels)

    def uniform(limit: float) -> Tensor:
        return (2 * torch.rand(rows, generator=generator) - 1) * limit

    angle, shear = uniform(math.radians(ROTATION)), uniform(SHEAR)
    stretch_x, stretch_y = 1 + uniform(SCALE), 1 + uniform(SCALE)
    cos, sin = torch.cos(angle), torch.sin(angle)
    # affine_grid's coordinates run from -1 to 1: a shift of a share of the width is twice that
    first = torch.stack([cos * stretch_x, (shear - sin) * stretch_y, uniform(2 * SHIFT)], dim=1)
    second = torch.stack([sin * stretch_x, cos * stretch_y, uniform(2 * SHIFT)], dim=1)
    theta = torch.stack([first, second], dim=1).to(pixels)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def _start(network: Classifier, generator: torch.Generator) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(network.head.weight, std=0.01, generator=generator)


def _epochs(n: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`steps` batches of row numbers: one permutation after the other, so that every image is seen equally often."""
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(left) < BATCH_SIZE:
            left = torch.cat([left, torch.randperm(n, generator=generator)])
        yield left[:BATCH_SIZE]
        left = left[BATCH_SIZE:]


def train_classifier(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    classes: int,
    training: ClassifierTraining,
    device: torch.device,
    description: str = "classifier",
) -> Classifier:
    """Train on images uint8 (n, H, W, C) with labels int64 (n,) in [0, classes); returns the network in eval mode.

    AdamW at 3e-3 with a cosine to zero, label smoothing 0.1, every image augmented anew in each batch. Every random
    number comes from `training.seed`: equal images and device give an equal network.
    """
    if len(images) != len(labels) or len(images) == 0:
        raise InputError(f"{description}: {len(images)} images and {len(labels)} labels; one label per image is needed")
    generator = torch.Generator().manual_seed(training.seed)
    with torch.random.fork_rng(devices=[]):  # the layers' default start is overwritten; keep the caller's random state
        network = Classifier(images.shape[3], classes)
    _start(network, generator)
    network.to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR)
    warmup = max(1, training.steps // 10)
    bar = progress(_epochs(len(images), training.steps, generator), desc=description, total=training.steps, leave=False)
    for step, rows in enumerate(bar):
        pixels = augment(to_pixels(images[rows.numpy()]), generator).to(device)
        target = torch.from_numpy(labels[rows.numpy()]).to(device)
        features = network.features(pixels)
        kept = (torch.rand(features.shape, generator=generator) >= DROPOUT).to(features) / (1 - DROPOUT)
        loss = F.cross_entropy(network.head(features * kept), target, label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = LR * lr_factor("cosine", step, training.steps, warmup_steps=warmup - 1)
        optimizer.step()
    return network.eval()


@torch.inference_mode()
def predict(
    network: Classifier, images: NDArray[np.uint8], device: torch.device
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits (n, classes) and features (n, 96) of images uint8 (n, H, W, C)."""
    network = network.to(device).eval()
    logits, features = [], []
    for start in range(0, len(images), PREDICTED_AT_ONCE):
        out, inner = network(to_pixels(images[start : start + PREDICTED_AT_ONCE]).to(device))
        logits.append(out.cpu().numpy())
        features.append(inner.cpu().numpy())
    return np.concatenate(logits), np.concatenate(features)


def save_classifier(path: Path, network: Classifier) -> None:
    with whole_file(path, private=True) as temporary:
        save_file({key: value.contiguous().cpu() for key, value in network.state_dict().items()}, temporary)


def load_classifier(path: Path) -> Classifier:
    """Read what `save_classifier` wrote; channels and classes are read off the weights' shapes."""
    state = load_file(path)
    with torch.random.fork_rng(devices=[]):
        network = Classifier(state["body.0.weight"].shape[1], state["head.weight"].shape[0])
    network.load_state_dict(state)
    return network.eval()
