"""Arithmetic of a private step on many GPUs: its parts, and where more GPUs stop helping. It measures nothing.

It counts operations and adapters on networks of the published width without weights, as a dry run does. `Assumed`
states all other numbers. `python -m benchmarks.scaling` prints the tables of docs/performance.md.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import click
import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from scipy import stats

from benchmarks.tables import markdown
from dp_lora.config.schema import Lora
from dp_lora.models.counting import lora_factors
from dp_lora.models.estimate import PEAK, SHARE_OF_PEAK, row_flops, time_text
from dp_lora.models.families import FAMILIES
from dp_lora.models.flops import count_operations
from dp_lora.models.meta import tensor_shapes
from dp_lora.models.shapes import BaseShapes
from dp_lora.models.targets import adapted_ranks
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.training.physical_batch import evenly, rows_of_a_step

GPUS = (1, 8, 64, 512)
RANKS = (4, 16)


@dataclass(frozen=True)
class Assumed:
    """The assumptions behind the tables; the operations are counted."""

    people: int = 28_000  # units of one picture, k=1
    batch: int = 2_048  # expected
    steps: int = 137
    checkpointing: float = 1.45  # time of a row whose activations are computed again
    link: float = 2e9  # bytes/s into the first rank, over gloo's TCP, whatever the number of senders
    latency: float = 100e-6  # seconds of one exchange between two ranks
    normals: float = 50e6  # noise of the first rank, numbers/s, float64 on one core
    spread: float = 0.02  # standard deviation of the time of a rank over its mean, from rank to rank and step to step


# pipeline class, side in pixels, rows that fit on 80 GB with checkpointing
BASES = {
    "SD1.5, 512": ("StableDiffusionPipeline", 512, 256),
    "SDXL, 1024": ("StableDiffusionXLPipeline", 1024, 128),
    "FLUX.1, 1024": ("FluxPipeline", 1024, 24),
}


def _denoiser(pipeline: str) -> Any:
    """The denoiser at its published width, without weights."""
    if pipeline == "StableDiffusionPipeline":
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    if pipeline == "StableDiffusionXLPipeline":
        return UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    return FluxTransformer2DModel(guidance_embeds=True)


@dataclass(frozen=True)
class Counted:
    """One base at one rank of LoRA."""

    flops: int  # of a row, forward and backward
    trained: int  # numbers
    fits: int  # rows at a time

    def row(self, assumed: Assumed) -> float:
        """Seconds of a row, checkpointed."""
        return self.flops * assumed.checkpointing / (PEAK["bfloat16"] * SHARE_OF_PEAK)


def counted(name: str) -> dict[int, Counted]:
    """The counts of a base of BASES, by rank of LoRA."""
    pipeline, size, fits = BASES[name]
    family, channels = FAMILIES[pipeline], 16 if pipeline == "FluxPipeline" else 4
    four = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    with torch.device("meta"):
        denoiser = _denoiser(pipeline)
        vae = AutoencoderKL(3, 3, *four, (128, 256, 512, 512), 2, latent_channels=channels, sample_size=size)
    shapes = BaseShapes(tensor_shapes(denoiser), tensor_shapes(vae), 0, 0, family)
    operations = count_operations(denoiser, vae, family, size)
    found = {}
    for rank in RANKS:
        lora = Lora(rank=rank, rank_schedule="constant", targets="default", train="AB")
        layers = adapted_ranks(shapes.denoiser, lora, family)
        trained = sum(sum(lora_factors(shapes.denoiser, layer, r)) for layer, r in layers.items())
        found[rank] = Counted(row_flops(operations, shapes, lora).train, trained, fits)
    return found


@dataclass(frozen=True)
class Step:
    """Seconds and bytes of one step on `gpus` ranks."""

    base: Counted
    gpus: int
    assumed: Assumed

    @cached_property
    def rows(self) -> float:
        """The expected number of rows that a rank computes, padding included, over the drawn number of units."""
        a = self.assumed
        plan = PrivacyPlan(1.0, a.batch / a.people, 1.0, a.steps, float(a.batch), 1e-5, 1.0, 1, "picture")
        at_most = rows_of_a_step(plan, self.gpus)
        size = evenly(at_most, min(self.base.fits, at_most), 1)
        drawn = np.arange(a.people + 1)
        share = np.ceil(drawn / self.gpus)  # units are dealt out after the draw, so shares differ by at most one
        chances = stats.binom.pmf(drawn, a.people, a.batch / a.people)
        return float((chances * np.ceil(share / size) * size).sum())

    @property
    def compute(self) -> float:
        return self.rows * self.base.row(self.assumed)

    @property
    def straggling(self) -> float:
        """Seconds that the slowest rank takes beyond the mean."""
        return self.compute * self.assumed.spread * most_of_normals(self.gpus)

    @property
    def received(self) -> int:
        """Bytes of sums, float64, that reach the first rank."""
        return 8 * self.base.trained * (self.gpus - 1)

    @property
    def exchange(self) -> float:
        """Seconds to send weights (float32) to all ranks over a tree, sums to the first, and three small messages."""
        if self.gpus == 1:
            return 0.0
        rounds = math.ceil(math.log2(self.gpus))
        weights = rounds * (4 * self.base.trained / self.assumed.link + self.assumed.latency)
        return weights + self.received / self.assumed.link + 3 * (self.gpus - 1) * self.assumed.latency

    @property
    def ring(self) -> float:
        """Seconds that the sums alone would take if partial sums went around all ranks (gloo's reduce)."""
        parts = 2 * (self.gpus - 1)
        return parts * (8 * self.base.trained / self.gpus / self.assumed.link + self.assumed.latency)

    @property
    def noise(self) -> float:
        return self.base.trained / self.assumed.normals

    @property
    def seconds(self) -> float:
        return self.compute + self.straggling + self.exchange + self.noise


def most_of_normals(number: int) -> float:
    """The expected largest of `number` standard normal variables."""
    grid = np.linspace(-8, 8, 1_601)
    below = stats.norm.cdf(grid) ** number
    upper, lower = grid >= 0, grid <= 0
    return float(np.trapezoid(1 - below[upper], grid[upper]) - np.trapezoid(below[lower], grid[lower]))


def largest_share(people: int, rate: float, gpus: int) -> float:
    """The expected largest share if each rank tossed the coins of its own part of the people."""
    each = np.arange(math.ceil(people / gpus) + 1)
    return float((1 - stats.binom.cdf(each, math.ceil(people / gpus), rate) ** gpus).sum())


def stops(base: Counted, assumed: Assumed) -> int:
    """Number of GPUs at which receiving the sums takes as long as computing a share."""
    return round(math.sqrt(assumed.batch * base.row(assumed) * assumed.link / (8 * base.trained)))


def _steps(bases: dict[str, dict[int, Counted]], assumed: Assumed) -> Iterator[list[str]]:
    for name, ranks in bases.items():
        for rank, base in ranks.items():
            alone = Step(base, 1, assumed).seconds
            for gpus in GPUS[1:]:
                step = Step(base, gpus, assumed)
                parts = [step.compute, step.straggling, step.exchange, step.noise, step.seconds]
                yield [
                    f"{name}, {rank}",
                    str(gpus),
                    *(f"{part:.2f}" for part in parts),
                    f"{alone / step.seconds / gpus:.0%}",
                    f"{step.received / 1e9:.2f}",
                    f"{step.ring:.2f}",
                ]


def _bases(bases: dict[str, dict[int, Counted]], assumed: Assumed) -> Iterator[list[str]]:
    for name, ranks in bases.items():
        for rank, base in ranks.items():
            one = Step(base, 1, assumed)
            yield [
                f"{name}, {rank}",
                f"{base.flops / 1e12:.3g}",
                f"{1000 * base.row(assumed):.3g}",
                f"{base.trained / 1e6:.2f}",
                f"{8 * base.trained / 1e6:.3g}",
                time_text(one.seconds * assumed.steps),
                str(stops(base, assumed)),
            ]


def _shares(assumed: Assumed) -> Iterator[list[str]]:
    for gpus in GPUS[1:]:
        mean = assumed.batch / gpus
        drawn = np.arange(assumed.people + 1)
        chances = stats.binom.pmf(drawn, assumed.people, assumed.batch / assumed.people)
        dealt = float((chances * np.ceil(drawn / gpus)).sum())
        parts = largest_share(assumed.people, assumed.batch / assumed.people, gpus)
        yield [str(gpus), f"{mean:g}", f"{dealt:.2f}", f"{parts:.1f}", f"{parts / dealt:.2f}"]


@click.command()
def main() -> None:
    """Print the tables and their assumptions."""
    assumed = Assumed()
    bases = {name: counted(name) for name in BASES}
    stated = ", ".join(f"{field.name} {getattr(assumed, field.name):g}" for field in fields(assumed))
    click.echo(f"one H100 at {SHARE_OF_PEAK:.0%} of {PEAK['bfloat16'] / 1e12:.0f} TFLOP/s; {stated}\n")
    head = [
        "base, pixels, LoRA",
        "TFLOP a row",
        "ms a row",
        "trained, M",
        "sum, MB",
        f"{assumed.steps} steps on one GPU",
    ]
    head.append("GPUs where sums take as long as rows")
    click.echo(markdown(head, list(_bases(bases, assumed))))
    head = ["base, pixels, LoRA", "GPUs", "rows, s", "stragglers, s", "exchange, s", "noise, s", "step, s", "of ideal"]
    click.echo(markdown([*head, "sums, GB", "by a ring, s"], list(_steps(bases, assumed))))
    head = ["GPUs", "mean share", "largest, dealt out", "largest, of own parts", "ratio"]
    click.echo(markdown(head, list(_shares(assumed))), nl=False)


if __name__ == "__main__":
    main()
