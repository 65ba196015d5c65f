"""How long commands take before they work. `python -m benchmarks.startup` prints seconds beside the bar of each.

The least of a few calls counts: another process on the machine makes a call slower, never faster. Commands that count a
base's operations get a base with random weights, of the default experiment's size. The last two rows have no base, and
no shipped config has the network of the last row.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click
import torch

from dp_lora.config import ROOT, STAGES, load
from dp_lora.config.classes import class_names
from dp_lora.diffusion import make_scheduler
from dp_lora.models.autoencoder import build_autoencoder, latent_size
from dp_lora.models.flops import count_operations
from dp_lora.models.folder import save_model
from dp_lora.models.info import model_info
from dp_lora.models.meta import meta_copies
from dp_lora.models.unet import build_unet

HELP, DRY_RUN, COUNT = 1.0, 4.0, 5.0  # seconds, on two cores that do nothing else


COUNTING = ("main", "finetune", "sample", "count_params")


def commands(base: Path) -> Iterator[tuple[list[str], float | None]]:
    """Each measured call, as arguments of `dp-lora`, and its bar in seconds; None: it has no bar."""
    given = ["--overrides", f"model.base={base}"]
    for name in STAGES:
        yield [name, "--help"], HELP
    for name in STAGES:
        yield [name, "--dry-run", *(given if name in COUNTING else [])], DRY_RUN
    yield ["count_params", *given], COUNT
    yield ["finetune", "--dry-run", "--config", "celebahq-eps10"], DRY_RUN
    yield ["finetune", "--dry-run", "--config", "celebahq-eps10", "--overrides", "ldm.layers_per_block=1"], None


def make_base(folder: Path) -> None:
    """A base of the default experiment's size, with random weights."""
    config = load("mnist5k")
    ldm, classes = config.ldm, class_names(config.public.classes)
    vae = build_autoencoder(config.autoencoder, config.public.channels, config.public.size)
    unet = build_unet(ldm, config.autoencoder.latent_channels, latent_size(vae))
    info = model_info(
        classes=classes,
        null_row=True,
        size=config.public.size,
        channels=config.public.channels,
        prediction_type=ldm.prediction_type,
        trained_on={"source": "nothing"},
        privacy_status="public",
        seed=0,
        sections={},
    )
    scheduler = make_scheduler(ldm.beta_schedule, ldm.beta_start, ldm.beta_end, ldm.prediction_type)
    embedding = torch.zeros(len(classes) + 1, ldm.cross_attention_dim)
    save_model(folder, unet, vae, scheduler, embedding, info, operations=count_operations(*meta_copies(unet, vae)))


def seconds(arguments: list[str], store: Path) -> float:
    """Seconds of one call at the project's root, with an MLflow store of its own. Raises where it fails."""
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{store}/mlflow.db"}
    environment.pop("MLFLOW_RUN_ID", None)
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "dp_lora", *arguments], cwd=ROOT, env=environment, capture_output=True, check=True
    )
    return time.perf_counter() - began


@click.command()
@click.option("--calls", default=3, type=click.IntRange(1), show_default=True, help="calls of each; the least counts")
def main(calls: int) -> None:
    """Print a Markdown table: command, seconds, bar. Exit 1 if a command is above its bar."""
    above = False
    click.echo("| command | seconds | bar |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as store:
        base = Path(store) / "base"
        make_base(base)
        for arguments, bar in commands(base):
            least = min(seconds(arguments, Path(store)) for _ in range(calls))
            above |= bar is not None and least > bar
            shown = " ".join(arguments).replace(str(base), "BASE")
            click.echo(f"| `dp-lora {shown}` | {least:.1f} | {'' if bar is None else f'{bar:g}'} |")
    sys.exit(int(above))


if __name__ == "__main__":
    main()
