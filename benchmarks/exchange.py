"""Today's sum of the ranks beside other ways to sum: their time on four gloo ranks of this machine, and their bits.

Every way sums float64 vectors of an adapter's length on the first rank. The rounds are interleaved, so that their
ratios hold on a machine that does other work too. `python -m benchmarks.exchange --ranks 4 --rounds 9`.
"""

import os
import statistics
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch
from torch import Tensor, distributed

from benchmarks.forked import run_forked
from benchmarks.ratios import against, interleaved
from dp_lora.team import Team

SIZES = (9_856, 800_000, 3_000_000, 20_000_000)  # digits; SD1.5 at rank 4; SD1.5 at 16; FLUX at 16 (26 M)
TODAY = "Team.sum"
Way = Callable[[Team, Tensor], Tensor]


def today(team: Team, vector: Tensor) -> Tensor:
    """Add one vector after the other, in the order of the ranks."""
    return team.sum({"w": vector})["w"]


def gathered(team: Team, vector: Tensor) -> Tensor:
    """Gather all vectors on the first rank, then add them in the order of the ranks."""
    flat = vector.clone()
    parts = [torch.empty_like(flat) for _ in range(team.size)] if team.first else None
    distributed.gather(flat, parts, dst=0)
    for part in (parts or [])[1:]:
        flat += part
    return flat


def reduced(_: Team, vector: Tensor) -> Tensor:
    """Use gloo's own reduce: partial sums go around all ranks."""
    flat = vector.clone()
    distributed.reduce(flat, dst=0)
    return flat


def all_reduced(_: Team, vector: Tensor) -> Tensor:
    """Use gloo's all_reduce: as `reduced`, but every rank gets the sum."""
    flat = vector.clone()
    distributed.all_reduce(flat)
    return flat


WAYS: dict[str, Way] = {
    TODAY: today,
    "gather": gathered,
    "reduce": reduced,
    "all_reduce": all_reduced,
}


def measured(team: Team, size: int, rounds: int) -> tuple[dict[str, list[float]], dict[str, bool]]:
    """Seconds of each way in each round on this rank, and whether its sum equals today's bit by bit."""
    vector = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(team.rank))
    expected = today(team, vector)
    same = {name: torch.equal(way(team, vector), expected) for name, way in WAYS.items()}
    # a barrier before each way: without it a rank's wait for the others would count as the next way's time
    steps = {name: partial(way, team, vector) for name, way in WAYS.items()}
    distributed.barrier()
    return interleaved(steps, rounds, distributed.barrier), same


def _rank(team: Team, folder: Path, rounds: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=team.rank,
        world_size=team.size,
        timeout=timedelta(minutes=10),
    )
    for size in SIZES:
        seconds, same = measured(team, size, rounds)
        if team.first:
            show(size, seconds, same)
    distributed.destroy_process_group()


def show(size: int, seconds: dict[str, list[float]], same: dict[str, bool]) -> None:
    for name, times in seconds.items():
        ratio = statistics.median(against(seconds, name, TODAY))
        bits = "equal" if same[name] else "other"
        milliseconds = 1000 * statistics.median(times)
        click.echo(f"| {size:,} | {name} | {milliseconds:.1f} | {ratio:.2f} | {bits} |")


@click.command()
@click.option("--ranks", default=4, type=click.IntRange(min=2))
@click.option("--rounds", default=9, type=click.IntRange(min=3))
def main(ranks: int, rounds: int) -> None:
    """Print time, ratio to today's way and bits of each way to sum vectors of the ranks on the first one."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    click.echo("| numbers (float64) | way | ms | / Team.sum | bits |\n| --- | --- | --- | --- | --- |")
    with TemporaryDirectory() as folder:
        run_forked(ranks, lambda rank: _rank(Team(rank, ranks), Path(folder), rounds))


if __name__ == "__main__":
    main()
