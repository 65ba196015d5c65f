"""Cost of a config's work, before any of it is done: operations, and the time that they take.

Operations are those of matrix products and convolutions, each done once: kernels of attention do some of them again in
the backward pass. Where rates were measured on a GPU at hand (`training/measure.py`) the time is extrapolated from
them. Else it is computed for a named GPU, at a share of its peak that small networks do not reach, and on a machine
without a GPU for its processor too. Reading and writing are left out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dp_lora.config.prompts import drawn_prompts
from dp_lora.config.schema import Config, Lora
from dp_lora.models.counting import lora_factors
from dp_lora.models.families import CLASSES, Family
from dp_lora.models.operations import Operations, pipeline_key, read_operations
from dp_lora.models.pipeline_index import JUDGED_AT, steps_and_guidance
from dp_lora.models.shapes import BaseShapes
from dp_lora.models.shipped import counted_before
from dp_lora.models.targets import adapted_ranks

GPU = "one NVIDIA H100 SXM"
PEAK = {"float32": 66.9e12, "bfloat16": 989.4e12}  # FLOP/s by its data sheet, dense, TF32 off
SHARE_OF_PEAK = 0.4
GRID_IMAGES = 4  # per class, of a grid that fine-tuning draws


@dataclass(frozen=True)
class RowFlops:
    """Operations of one row (one noise draw of one picture), or of one picture."""

    train: int  # UNet forward, and backward to the trained weights and the class embedding
    forward: int  # UNet alone
    encode: int
    decode: int


@dataclass(frozen=True)
class Rates:
    """Seconds that were measured on a device."""

    device: str
    basis: str  # the measured work, in words
    row: float  # of the private step
    image: float  # drawn and decoded
    encode: float  # one picture


@dataclass(frozen=True)
class Processor:
    """Measured speed of this machine's processor."""

    cores: int
    peak: float  # FLOP/s of a large float32 matrix product


@dataclass(frozen=True)
class Work:
    """A part of a stage."""

    name: str
    amount: str  # in words, such as "137 steps of 4,096 rows"
    flops: float
    precision: str  # a key of PEAK
    measured: float | None = None  # seconds, extrapolated from rates; None: computed

    @property
    def seconds(self) -> float:
        """As extrapolated, else on GPU at SHARE_OF_PEAK."""
        if self.measured is not None:
            return self.measured
        return self.flops / (PEAK[self.precision] * SHARE_OF_PEAK)

    def seconds_on(self, processor: Processor) -> float:
        """As computed for a processor, which does everything in float32."""
        return self.flops / (processor.peak * SHARE_OF_PEAK)


def count_flops(config: Config, base: Path, shapes: BaseShapes) -> RowFlops:
    """Operations at the config's width, LoRA included, of the base in `base`, or of the one that `config` would make.

    Raises InputError as `adapted_ranks`.
    """
    return row_flops(base_operations(config, base, shapes.family), shapes, config.lora)


def base_operations(config: Config, base: Path, family: Family) -> Operations:
    """As the base states them, or as counted beforehand for a shipped config whose base is missing.

    Elsewhere the networks are built without weights and counted, which takes seconds.
    """
    # a model folder of ours has one size; a pipeline draws in the pictures' size
    size = None if family is CLASSES else config.data.size
    found = read_operations(base, None if size is None or not base.exists() else pipeline_key(base, size))
    if found is None and not base.exists() and (before := counted_before(config)) is not None:
        found = before.operations
    if found is None:
        from dp_lora.models.flops import count_operations  # torch and diffusers
        from dp_lora.models.meta import meta_networks

        found = count_operations(*meta_networks(config, base), family, size)
    return found


def row_flops(operations: Operations, base: BaseShapes, lora: Lora) -> RowFlops:
    """The base's own operations and LoRA's: two for each weight and token in each product that the weight is in.

    The products: the layer's own, that for the input's gradient and, if the weight is trained, that for the weight's.
    A few percent off where `lora` adapts layers outside attention.
    """
    products = gradients = 0
    for name, rank in adapted_ranks(base.denoiser, lora, base.family).items():
        a, b = lora_factors(base.denoiser, name, rank)
        tokens = operations.tokens.get(name, 0)  # attn2's to_q and to_k are not called for one token
        products += 2 * tokens * (a + b)
        gradients += 2 * tokens * (b if lora.train == "B" else a + b)
    forward = operations.forward + products
    return RowFlops(
        train=forward + operations.backward + products + gradients,
        forward=forward,
        encode=operations.encode,
        decode=operations.decode,
    )


def finetuning_work(
    config: Config,
    row: RowFlops,
    steps: int,
    expected_batch: float,
    rates: Rates | None = None,
    family: Family = CLASSES,
) -> list[Work]:
    """Encoding, DP-SGD and grids of a private fine-tuning of `steps` steps, from public numbers alone.

    A unit is taken for one picture: with privacy.unit=person the number of pictures is no public number.
    """
    rows = round(expected_batch) * config.privacy.k
    each = " of one picture a person" if config.privacy.unit == "person" else ""
    every = config.train.grid_every
    grids = 1 + -(-steps // every) if every else 0  # the first one before the first step
    # without classes the base is text-to-image, and its prompts count
    drawn = grids * GRID_IMAGES * (len(config.data.classes) or len(drawn_prompts(config)))
    pictures = config.data.n_public
    encoding, dp_sgd = pictures * float(row.encode), steps * rows * float(row.train)
    drawing = drawn * (_flops_of_latent(config, row, family) + row.decode) if drawn else 0.0
    seconds = (pictures * rates.encode, steps * rows * rates.row, drawn * rates.image) if rates else (None,) * 3
    return [
        Work("latents", f"{pictures:,} pictures", encoding, "float32", seconds[0]),
        Work(
            "DP-SGD", f"{steps:,} steps of {rows:,} rows{each}", dp_sgd, _on_gpu(config.compute.precision), seconds[1]
        ),
        Work("grids", f"{drawn:,} images", drawing, _on_gpu(config.sampling.precision), seconds[2]),
    ]


def sampling_work(config: Config, row: RowFlops, rates: Rates | None = None, family: Family = CLASSES) -> list[Work]:
    """Drawing sampling.n latents, and decoding them; measured rates cover both in one."""
    sampling = config.sampling
    amount = f"{sampling.n:,} images at {steps_and_guidance(sampling, family)[0]} steps"
    amount += ", each drawn once and judged" if sampling.attempts > 1 else ""
    precision, latents = _on_gpu(sampling.precision), sampling.n * _flops_of_latent(config, row, family)
    decoding = sampling.n * float(row.decode)
    if rates:
        return [Work("samples", f"{amount}, decoded", latents + decoding, precision, sampling.n * rates.image)]
    return [
        Work("samples", amount, latents, precision),
        Work("decoding", f"{sampling.n:,} images", decoding, "float32"),
    ]


def _on_gpu(precision: str) -> str:
    return "bfloat16" if precision == "auto" else precision


def _flops_of_latent(config: Config, row: RowFlops, family: Family) -> float:
    steps, scale = steps_and_guidance(config.sampling, family)
    judging = len(JUDGED_AT) * len(config.data.classes) if config.sampling.attempts > 1 else 0
    return float(((1 if scale == 1 else 2) * steps + judging) * row.forward)


def estimate_lines(parts: Sequence[Work], rates: Rates | None = None) -> dict[str, str]:
    """One line for each part that has work, one for their sum, and one for the basis of the figures."""
    lines = {
        f"estimated {part.name}": (
            f"{part.amount}, {flops_text(part.flops)}, {time_text(part.seconds)} in {part.precision}"
        )
        for part in parts
        if part.flops
    }
    lines["estimated total"] = time_text(sum(part.seconds for part in parts))
    lines["estimated on"] = estimate_basis(rates)
    return lines


def estimate_basis(rates: Rates | None = None) -> str:
    """The basis of the figures of time, in one line."""
    if rates:
        return f"{rates.device}: measured on {rates.basis} of dummy data, and extrapolated; TF32 off"
    peaks = ", ".join(f"{PEAK[name] / 1e12:.0f} TFLOP/s in {name}" for name in PEAK)
    share = f"{SHARE_OF_PEAK:.0%} of its peak ({peaks}, TF32 off)"
    return f"{GPU} at {share}; computed, not measured; small nets reach less"


def processor_basis(processor: Processor) -> str:
    """The basis of figures of time on a processor, in one line."""
    reached = f"{processor.peak / 1e9:.0f} GFLOP/s that a matrix product reaches"
    return f"this machine's {processor.cores} cores, at {SHARE_OF_PEAK:.0%} of the {reached} now"


def flops_text(flops: float) -> str:
    """Such as 125 PFLOP: three digits, in the unit from M to E that leaves 1 to 999 before the point."""
    rounded = float(f"{flops:.3g}")
    power = min(18, max(6, 3 * (int(math.log10(rounded)) // 3))) if rounded >= 1 else 6
    return f"{rounded / 10**power:.3g} {'MGTPE'[power // 3 - 2]}FLOP"


def time_text(seconds: float) -> str:
    """Such as 5.3 minutes: two digits."""
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:,.{1 if seconds < 9.95 * length else 0}f} {unit}"
    return f"{seconds:.2g} seconds"
