"""Canaries in the unchanged private step: the view of an auditor who knows everything but the coins.

A canary is a unit whose raw gradient is huge along one coordinate of its own, in each of its rows, before the clip: the
most that one unit can do. A fair coin says whether it is in the data; then the step's own Poisson draw says in which
steps it takes part. All other units pull elsewhere. The auditor sees each noisy sum along each canary's coordinate.

Nothing here reads private data, and nothing here is released: the sums are of made-up units alone.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dp_lora.privacy import step as private_step
from dp_lora.privacy.clipping import STABILITY
from dp_lora.privacy.ledger import Ledger
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.privacy.randomness import Randomness
from dp_lora.privacy.sums import LossFactory
from dp_lora.team import Team

HUGE = 1e3  # least ratio of a canary's raw gradient to the clip, and to the STABILITY of automatic clipping
ELSEWHERE = 8  # coordinates in which the other units' gradients lie
OTHERS = 97  # directions of the other units' gradients
OTHER_UNITS = 20  # units that are no canaries
PERSON = 12  # pictures of a person; at PERSON_ROWS rows at a time every person is cut
PERSON_ROWS = 4
ELEMENTS = 4_000_000  # of gradients at a time: bounds memory only
MEMORY = Path("/dev/shm")  # of Linux
WORLDS = 400  # runs with, and as many without, one unit; half of them count
SPREAD = 1000  # coordinates over which a run's spread is taken


def toss(m: int, randomness: Randomness) -> NDArray[np.bool_]:
    """Who of `m` canaries is in: a fair coin each.

    Guarantee: fair and independent up to 2^-53, of fresh entropy where `randomness` is fresh; nothing else draws from
    this stream.
    """
    return randomness.numpy("canaries", 0).random(m) < 0.5


def canary_loss(m: int, strength: float) -> LossFactory:
    """Loss of a row: canary i, picture i, pulls at coordinate i by HUGE * `strength`, others in the last ELSEWHERE.

    Guarantee: a canary's gradient lies along its own coordinate, where no other unit has a gradient.
    """
    directions = strength * torch.randn(OTHERS, ELSEWHERE, generator=torch.Generator().manual_seed(0))

    def factory(_draws):
        def loss(copies, rows):
            own = copies["w"][rows.slot]
            pulled = own.gather(1, rows.picture.clamp(0, m - 1)[:, None])[:, 0]
            away = (own[:, m:] * directions.to(own.device)[rows.picture % OTHERS]).sum(1)
            return torch.where(rows.picture < m, HUGE * strength * pulled, away)

        return loss

    return factory


def canary_units(coins: NDArray[np.bool_], pictures_each: int, others: int) -> list[list[int]]:
    """The canaries that are in, then `others` units; a person is one picture, several times.

    Guarantee: a canary that is out is in no unit.
    """
    m = len(coins)
    return [[int(i)] * pictures_each for i in np.flatnonzero(coins)] + [[m + i] for i in range(others)]


def observe(
    plan: PrivacyPlan,
    coins: NDArray[np.bool_],
    randomness: Randomness,
    device: torch.device,
    others: int = OTHER_UNITS,
    team: Team = Team(),  # noqa: B008 (frozen)
) -> NDArray[np.float64]:
    """Every noisy sum of the plan's steps along every canary's coordinate, in units of the clip: (steps, m).

    All of `noisy_sum` is at work: Poisson draw, micro-batches, clip, ledger, noise. With `plan.unit` person each canary
    has PERSON pictures, and is cut by the micro-batches. `others` more units take part.

    Guarantee: these sums depend on the coins through the step's output alone, as `best_bound` needs.
    """
    m, person = len(coins), plan.unit == "person"
    # a draw fills about two micro-batches: the rest of the last one is padding
    drawn = plan.sample_rate * (m / 2 + others) * plan.k
    rows = PERSON_ROWS * plan.k if person else max(plan.k, min(round(drawn / 2), ELEMENTS // (m + ELSEWHERE)))
    units = canary_units(coins, PERSON if person else 1, others)
    parameters = {"w": torch.zeros(m + ELSEWHERE, device=device)}
    loss = canary_loss(m, max(plan.max_grad_norm, STABILITY))
    seen = np.empty((plan.steps, m))
    with _ledger() as ledger:
        for step in range(plan.steps):
            total, _ = private_step.noisy_sum(plan, step, units, loss, parameters, randomness, ledger, rows, team)
            seen[step] = total["w"][:m].cpu().numpy() / plan.max_grad_norm
    return seen


def spreads(
    plan: PrivacyPlan, randomness: Randomness, device: torch.device, runs: int = WORLDS
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Spread of the mean gradient with (runs,) and without (runs,) one unit that pulls nowhere, over the stated spread.

    The canaries test sums. Nothing done to a sum afterwards may depend on who took part: here one step's sum, in which
    all units take part (sample rate 1), goes through the code's own division. A divisor that counts the participants
    shows in the spread of the noise, whatever the unit's gradient is.

    Guarantee: all runs are independent, as `two_worlds_bound` needs them.
    """
    full = replace(plan, sample_rate=1.0)
    stated = plan.noise_multiplier * plan.max_grad_norm / plan.expected_batch
    found = [_spreads(full, units, randomness, device, runs) / stated for units in ([[0], [0]], [[0]])]
    return found[0], found[1]


def _spreads(
    plan: PrivacyPlan, units: Sequence[Sequence[int]], randomness: Randomness, device: torch.device, runs: int
) -> NDArray[np.float64]:
    parameters = {"w": torch.zeros(SPREAD, device=device)}
    world = replace(randomness, run_digest=f"{randomness.run_digest}, {len(units)} units")

    def nowhere(_draws):
        return lambda copies, rows: 0 * copies["w"][rows.slot].sum(1)

    found = np.empty(runs)
    with _ledger() as ledger:
        for run in range(runs):
            total, _ = private_step.noisy_sum(plan, run, units, nowhere, parameters, world, ledger, plan.k)
            found[run] = _root_mean_square(private_step.mean_gradient(total, plan)["w"])
    return found


@contextmanager
def _ledger() -> Iterator[Ledger]:
    """A ledger of made-up units: it need not outlive the process, so it lies in memory where MEMORY exists."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        yield Ledger(Path(folder) / "ledger.jsonl")


def _root_mean_square(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())
