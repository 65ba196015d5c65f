"""A tiny public set of pictures, a tiny config and a listener, for tests of the two pretraining stages."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dp_lora.config import Config, load
from dp_lora.data.layout import Picture, write_dataset
from dp_lora.data.png import encode_png
from dp_lora.events import Events

OVERRIDES = (
    "public.classes=[A,B] public.size=8 autoencoder.block_out_channels=[8,16] autoencoder.norm_num_groups=4 "
    "autoencoder.batch_size=4 autoencoder.epochs=2 ldm.block_out_channels=[8,16] ldm.norm_num_groups=4 "
    "ldm.attention_head_width=4 ldm.cross_attention_dim=8 ldm.batch_size=4 ldm.epochs=2 compute.device=cpu"
)


def stage_config(overrides: str = "") -> Config:
    return load("mnist5k", overrides=f"{OVERRIDES} {overrides}")


def write_pictures(folder: Path, n: int = 10, size: int = 8, channels: int = 1) -> Path:
    """Class A is bright at the left, class B at the right; seeded noise on both."""

    def pictures() -> Iterator[Picture]:
        generator = np.random.default_rng(0)
        for i in range(n):
            image = generator.integers(0, 100, (size, size, channels))
            half = slice(0, size // 2) if i % 2 == 0 else slice(size // 2, size)
            image[:, half] += 150
            yield Picture(f"{i}.png", "AB"[i % 2], "train", encode_png(image.astype(np.uint8)))

    write_dataset(folder, pictures(), {"name": "test"}, size, channels, packed=True)
    return folder


class Heard(Events):
    """Keeps the metrics, images and messages of a stage."""

    def __init__(self) -> None:
        self.metrics: list[tuple[str, float, int | None]] = []
        self.images: dict[str, Path] = {}
        self.messages: list[str] = []

    def metric(self, name: str, value: float, step: int | None = None) -> None:
        self.metrics.append((name, value, step))

    def image(self, name: str, path: Path) -> None:
        self.images[name] = path

    def message(self, text: str) -> None:
        self.messages.append(text)

    def values(self, name: str) -> list[float]:
        return [value for metric, value, _ in self.metrics if metric == name]
