"""Private steps on real gloo ranks, forked so that torch is imported once: gloo_steps OUT, for test_ranks.py.

It writes, for each number of ranks, {case: (noisy sum, units)} and the result of a mutant in which every rank adds
noise; and the first rank's message about a rank that hangs.
"""

import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from benchmarks.forked import run_forked
from dp_lora.errors import InputError
from dp_lora.privacy import sums as module
from dp_lora.privacy.gradients import NOBODY
from dp_lora.privacy.ledger import Ledger
from dp_lora.privacy.noise import add_noise
from dp_lora.privacy.randomness import Randomness
from dp_lora.privacy.step import noisy_sum
from dp_lora.team import RankLost, Team
from tests.support.tiny import linear_loss, no_privacy, plan_of

SECRET = b"0123456789abcdef0123456789abcdef"
DIRECTIONS = torch.randn(40, 3000, generator=torch.Generator().manual_seed(0))
EACH = [[i] for i in range(40)]
PERSONS = [[0, 1, 2, 3, 4], [5], [6, 7], [8, 9, 10], [11]]
CLIP = 0.5


def random_loss(draws):
    """A picture's direction times its own draw: a draw taken twice, or by another picture, changes the sum."""

    def loss(copies, rows):
        pictures = rows.picture.tolist()
        factor = torch.tensor([0.0 if p == NOBODY else draws[p].standard_normal() for p in pictures])
        return (copies["w"][rows.slot] * DIRECTIONS[rows.picture]).sum(1) * factor.float()

    return loss


# case -> plan, units, loss, rows at a time
CASES = {
    "drawn": (plan_of(max_grad_norm=CLIP), EACH, linear_loss(DIRECTIONS), 3),
    "without noise": (no_privacy(), EACH, random_loss, 4),
    "one unit": (no_privacy(sample_rate=1.0), EACH[:1], random_loss, 100),
    "nobody": (plan_of(sample_rate=1e-9, max_grad_norm=CLIP), EACH, random_loss, 100),
    "persons": (plan_of(sample_rate=1.0, max_grad_norm=CLIP, k=3, unit="person"), PERSONS, random_loss, 4),
    "published": (plan_of(max_grad_norm=CLIP, k=3, accounting="published"), EACH, random_loss, 5),
}


def one(case: str, team: Team, folder: Path):
    """The noisy sum and the number of units on the first rank; None on the others."""
    plan, units, loss, physical = CASES[case]
    # the other ranks start with wrong weights: the sum is right only if they get the first rank's
    parameters = {"w": torch.zeros(DIRECTIONS.shape[1]), "unused": torch.ones(2, 2)}
    if not team.first:
        parameters = {name: value + 7 for name, value in parameters.items()}
        module.assist(units, loss, parameters, team)
        return None
    ledger = Ledger(folder / f"{case} {team.size}.jsonl")
    total, facts = noisy_sum(plan, 5, units, loss, parameters, Randomness("run", SECRET), ledger, physical, team)
    team.once(None)
    return total, facts


def mutant(team: Team, folder: Path):
    """The case "nobody", but every rank adds noise to its share."""
    real = module.sum_over_units

    def noisy(*arguments):
        total, norms, losses = real(*arguments)
        generator = Randomness("other", SECRET).numpy("noise", team.rank)
        return (total if team.first else add_noise(total, CLIP, generator)), norms, losses

    module.sum_over_units = noisy
    result = one("nobody", team, folder / "mutant")
    module.sum_over_units = real
    return result


def unlike_memory(team: Team, folder: Path) -> list[list[int]]:
    """Rows of every micro-batch, rank by rank; the last rank has memory for two rows, the others for ten."""
    seen: list[int] = []
    most = 2 if team.rank == team.size - 1 else 10
    real = module.sum_over_units

    def limited(loss, parameters, batches, *clip):
        seen.clear()

        def watched(copies, rows):
            seen.append(len(rows.slot))
            if len(rows.slot) > most:
                raise torch.OutOfMemoryError("CUDA out of memory, pretended")
            return loss(copies, rows)

        return real(watched, parameters, batches, *clip)

    module.sum_over_units = limited
    plan = plan_of(max_grad_norm=CLIP, sample_rate=1.0)
    parameters = {"w": torch.zeros(DIRECTIONS.shape[1])}
    if team.first:
        ledger = Ledger(folder / f"unlike {team.size}.jsonl")
        noisy_sum(plan, 0, EACH, random_loss, parameters, Randomness("run"), ledger, 8, team)
        team.once(None)
    else:
        module.assist(EACH, random_loss, parameters, team)
    module.sum_over_units = real
    return team.gather(list(seen))


def work(team: Team, folder: Path) -> dict:
    results = {case: one(case, team, folder) for case in CASES}
    results["unlike memory"] = unlike_memory(team, folder)
    results["mutant"] = mutant(team, folder)
    results["map"] = list(team.map(lambda item: (item, team.rank), range(7)))
    assert team.first or results["map"] == []
    try:
        team.require_same("other data" if team.rank == 1 else "data")
        results["same"] = ""
    except InputError as error:
        results["same"] = str(error)
    return results


def waits_for_a_rank_that_hangs(folder: Path) -> None:
    """Stop the second of two ranks after one exchange; the first rank's message goes to folder/hung."""
    other = os.fork()
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=int(not other), world_size=2)
    group = distributed.new_group(timeout=timedelta(seconds=12), backend="gloo")  # as `launch.joined` makes it
    team = Team(int(not other), 2, 0.2, group)
    team.gather("here")
    if not other:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        team.sum({"w": torch.ones(3)})
    except RankLost as error:
        (folder / "hung").write_text(str(error), encoding="utf-8")
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)


def ranks(size: int, folder: Path, work: Callable[[Team, Path], object]) -> None:
    """Call `work` on `size` forked ranks; folder/SIZE.pt keeps the first rank's result."""

    def one_rank(rank: int) -> None:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/{size}", rank=rank, world_size=size)
        results = work(Team(rank, size), folder)
        if rank == 0:
            torch.save(results, folder / f"{size}.pt")
        distributed.destroy_process_group()

    run_forked(size, one_rank)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    (out / "mutant").mkdir()
    torch.set_num_threads(1)
    for number in (2, 3):
        ranks(number, out, work)
    waits_for_a_rank_that_hangs(out)
