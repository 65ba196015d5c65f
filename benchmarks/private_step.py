"""`make bench`: the cost of the private step beside the same step without privacy, as ratios measured side by side."""

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from benchmarks.ratios import Ratio, against, interleaved, peak_memory
from benchmarks.setups import CPU, setup, text_setup
from benchmarks.steps import own_floor, private, published, stock_floor, stock_text_floor
from benchmarks.tables import RUNS, markdown, write_report
from dp_lora.models.autoencoder import decode
from dp_lora.privacy.ledger import Ledger
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.privacy.randomness import Randomness
from dp_lora.privacy.sampling import poisson_draw
from dp_lora.privacy.step import noisy_sum
from dp_lora.progress import progress
from dp_lora.sampling import draw_pixels
from dp_lora.training.physical_batch import rows_of_a_step
from dp_lora.training.private_loss import diffusion_loss

STEP_BAR = {"S": 1.20, "M": 1.10}
TEXT_BAR = 1.20
MEMORY_BAR = 1.10
# the released pipeline spends half of its time in the autoencoder's convolutions, which the private step does not run;
# wider vectors of the CPU make them cheaper: the ratio was 6.3 with SSE4.1, 4.2 with AVX2, and 3.2 on another machine
S_PUBLISHED_BAR = 3.0 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 4.0
Advance = Callable[[], object]


def floors(size: str, rounds: int, advance: Advance) -> Iterator[Ratio]:
    """The private step over each floor, with the same rows, the same physical batch and two micro-batches."""
    of = setup(size)
    for k in (1, 4):
        pictures = range(2 * of.physical_batch // k)
        steps = {
            "private": private(of, pictures, k),
            "stock": stock_floor(of, pictures, k),
            "own": own_floor(of, pictures, k),
        }
        seconds = interleaved(steps, rounds, advance)
        peaks = {name: peak_memory(step) for name, step in steps.items()}
        for floor, shown in (("stock", "stock diffusers + PEFT"), ("own", "our own forward")):
            name = f"{size}, k={k}: private step / {shown} without privacy"
            yield Ratio(f"{name}, time", against(seconds, "private", floor), STEP_BAR[size], goal=1.0)
            yield Ratio(f"{name}, peak tensor memory", [peaks["private"] / peaks[floor]], MEMORY_BAR, goal=1.0)
        if k == 1:
            both = {"private": steps["private"], "whole": private(of, pictures, k, one_token=False)}
            seconds = interleaved(both, rounds, advance)
            name = f"{size}, k=1: cross-attention to one token cut short / whole, time"
            yield Ratio(name, against(seconds, "private", "whole"), 1.0)


def text_family(rounds: int, advance: Advance) -> Iterator[Ratio]:
    """The private step of a text-to-image base over its stock LoRA step, with the same rows and physical batch."""
    of = text_setup()
    pictures = range(2 * of.physical_batch)
    steps = {"private": private(of, pictures, 1), "stock": stock_text_floor(of, pictures)}
    seconds = interleaved(steps, rounds, advance)
    peaks = {name: peak_memory(step) for name, step in steps.items()}
    name = "T, k=1: private step / stock diffusers + PEFT without privacy"
    yield Ratio(f"{name}, time", against(seconds, "private", "stock"), TEXT_BAR, goal=1.0)
    yield Ratio(f"{name}, peak tensor memory", [peaks["private"] / peaks["stock"]], MEMORY_BAR, goal=1.0)


def published_pipeline(size: str, n: int, k: int, bar: float, rounds: int, advance: Advance) -> Ratio:
    """How many times faster than the released pipeline our step is at equal work: `n` pictures, k draws each.

    The pipeline takes 8 pictures at a time, as its job files say; our step takes its usual physical batch.
    """
    of = setup(size)
    steps = {"private": private(of, range(n), k), "published": published(of, range(n), k, 8)}
    seconds = interleaved(steps, rounds, advance)
    name = f"{size}, k={k}: released pipeline, emulated / private step, time"
    return Ratio(name, against(seconds, "published", "private"), bar, faster=True)


def linear_in_rows(rounds: int, advance: Advance) -> Iterator[Ratio]:
    """Time per row with four times the rows, by more pictures or more draws, over that of the small step."""
    of = setup("S")
    n = of.physical_batch
    steps = {
        "one": private(of, range(n), 1),
        "pictures": private(of, range(4 * n // 2), 2),
        "k": private(of, range(n), 4),
    }
    seconds = interleaved(steps, rounds, advance)
    for name, shown in (("pictures", "2 times the pictures, 2 times the draws"), ("k", "4 times the draws")):
        rows = [ratio / 4 for ratio in against(seconds, name, "one")]
        yield Ratio(f"S: time per row with {shown} / with one", rows, 1.10)


def flat_in_n(rounds: int, advance: Advance) -> Iterator[Ratio]:
    """Time per drawn unit of a whole step with 10 and 100 times the people, at the same expected batch."""
    of = setup("S")
    model = of.model()
    _, parameters = of.adapter(model.denoiser)
    expected = 128
    # the drawn batch varies from step to step, so the time counts per drawn unit
    with TemporaryDirectory() as folder:
        steps, drawn = {}, {}
        for times in (1, 10, 100):
            n = 1280 * times
            plan = PrivacyPlan(expected / n, 1.0, 1e-3, 10**6, float(expected), 1e-9, 1.0, 1, "picture")
            factory = diffusion_loss(
                of.config, model, np.resize(of.latents, (n, *of.latents.shape[1:])), np.resize(of.labels, n), CPU
            )
            units = [[picture] for picture in range(n)]
            ledger = Ledger(Path(folder) / f"{times}.jsonl")
            randomness = Randomness("benchmark")
            rows = min(of.physical_batch, rows_of_a_step(plan))
            drawn[times] = []

            def step(
                plan=plan, rows=rows, units=units, factory=factory, ledger=ledger, randomness=randomness, times=times
            ) -> None:
                _, facts = noisy_sum(plan, 0, units, factory, parameters, randomness, ledger, rows)
                drawn[times].append(facts.units)

            steps[str(times)] = step
        seconds = interleaved(steps, rounds, advance)
    each = {name: [s / u for s, u in zip(seconds[name], drawn[int(name)][1:], strict=True)] for name in seconds}
    for times in ("10", "100"):
        yield Ratio(
            f"S: time per drawn unit with {times} times the people / with 1,280", against(each, times, "1"), 1.10
        )


def poisson(rounds: int, advance: Advance) -> Ratio:
    """Time of our Poisson draw among a million units over a plain one."""
    n, q = 10**6, 2000 / 60000
    randomness = Randomness("benchmark")
    steps = {
        "ours": lambda: [poisson_draw(n, q, randomness.numpy("sampling", step)) for step in range(20)],
        "plain": lambda: [torch.rand(n) < q for _ in range(20)],
    }
    seconds = interleaved(steps, rounds, advance)
    return Ratio("Poisson draw of 1,000,000 / torch.rand(N) < q, time", against(seconds, "ours", "plain"), 1.5)


def logical_batch_memory(advance: Advance) -> Ratio:
    """Peak memory of a large logical batch over that of 8 examples, both in physical batches of 8."""
    of = setup("S")
    small = peak_memory(private(of, range(8), 1, 8))
    advance()
    large = peak_memory(private(of, [picture % len(of.latents) for picture in range(2048)], 1, 8))
    advance()
    return Ratio("S: 2,048 examples in physical batches of 8 / 8 examples, peak tensor memory", [large / small], 1.05)


def sampling(rounds: int, advance: Advance) -> Ratio:
    """Time of our sampling over diffusers' bare loop: the same model, steps and batch, down to pixels."""
    of = setup("S")
    model = of.model()
    settings = of.config.sampling
    settings.steps, settings.eta = 20, 0.0
    labels = [number % len(model.classes) for number in range(64)]
    shape = (len(labels), *of.latents.shape[1:])

    @torch.inference_mode()
    def bare() -> torch.Tensor:
        scheduler = DDIMScheduler.from_config(model.scheduler.config)
        scheduler.set_timesteps(settings.steps)
        latents = torch.randn(shape)
        context = model.class_embedding[labels].unsqueeze(1)
        for t in scheduler.timesteps:
            prediction = model.denoiser(latents, t, encoder_hidden_states=context).sample
            latents = scheduler.step(prediction, t, latents).prev_sample
        return decode(model.vae, latents)

    steps = {
        "ours": lambda: draw_pixels(model, labels, list(range(len(labels))), settings, 0, CPU),
        "bare": bare,
    }
    seconds = interleaved(steps, rounds, advance)
    return Ratio("S: sampling / the bare diffusers loop, time", against(seconds, "ours", "bare"), 1.05)


def measure(rounds: int) -> Iterator[Ratio]:
    calls = (rounds + 1) * (2 * 8 + 2 + 2 * 2 + 3 + 3 + 2 + 2) + 2
    with progress(total=calls, desc="bench", unit="step") as bar:
        for size in ("S", "M"):
            yield from floors(size, rounds, bar.update)
        yield from text_family(rounds, bar.update)
        yield published_pipeline("M", 8, 2, 1.3, rounds, bar.update)
        yield published_pipeline("S", 64, 12, S_PUBLISHED_BAR, rounds, bar.update)
        yield from linear_in_rows(rounds, bar.update)
        yield from flat_in_n(rounds, bar.update)
        yield poisson(rounds, bar.update)
        yield logical_batch_memory(bar.update)
        yield sampling(rounds, bar.update)


@click.command()
@click.option("--rounds", default=9, type=click.IntRange(min=9), help="interleaved rounds of each comparison")
def main(rounds: int) -> None:
    """Print every ratio beside its bar, and write them as JSON; exit 1 if one misses its bar."""
    began = time.monotonic()
    ratios = list(measure(rounds))
    table = markdown(["", "median", "bar", "goal", "result", "rounds"], [ratio.row() for ratio in ratios])
    minutes = (time.monotonic() - began) / 60
    write_report("bench", f"{table}\n{os.cpu_count()} cores, torch {torch.__version__}, {minutes:.1f} minutes\n")
    facts = [{"name": r.name, "rounds": r.rounds, "median": r.median, "bar": r.bar, "missed": r.missed} for r in ratios]
    machine = {"processor": platform.processor(), "cores": os.cpu_count(), "torch": torch.__version__}
    (RUNS / "bench.json").write_text(json.dumps({"machine": machine, "ratios": facts}, indent=1), encoding="utf-8")
    sys.exit(any(ratio.missed for ratio in ratios))


if __name__ == "__main__":
    main()
