"""Private steps with one fault each, which others have made before: an audit has to convict all of them.

`wrong` patches the running code with a fault; the case's plan states the claim.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

from torch import Tensor

from dp_lora.privacy import step as private_step
from dp_lora.privacy import sums
from dp_lora.privacy.accounting import calibrate, pld_epsilon
from dp_lora.privacy.audit_canaries import PERSON, PERSON_ROWS
from dp_lora.privacy.plan import AUTOMATIC, FLAT, PrivacyPlan
from dp_lora.privacy.published import published_plan

# the public numbers of mnist5k, the default experiment
PUBLIC = {"delta": 1e-5, "n_public": 4000, "batch_size": 400, "epochs": 15.0, "max_grad_norm": 0.05}
PUBLISHED = (2, 4, 12)  # draws of the released code's step

add_noise, poisson_draw, mean_gradient = private_step.add_noise, private_step.poisson_draw, private_step.mean_gradient
noisy_sum, micro_batches = private_step.noisy_sum, sums.micro_batches


@dataclass(frozen=True)
class Case:
    """A step to audit: the plan that it claims to follow, its fault, and the numbers that really hold."""

    name: str
    plan: PrivacyPlan
    fault: Callable[[PrivacyPlan], Mapping[str, Any]] = field(default=lambda _plan: {})
    jump: float = 1.0  # clips that a unit really moves the sum by
    rate: float = 1.0  # times the plan's sample rate
    noise: float = 1.0  # times the plan's noise
    convicted_by: str = ""  # the finding that has to convict it, at eps 1 and at eps 3; empty: the step is right

    @property
    def true_epsilon(self) -> float:
        """The epsilon that really holds; inf without noise, and where noise is used again."""
        plan = self.plan
        noise = self.noise * plan.noise_multiplier / self.jump
        return pld_epsilon(self.rate * plan.sample_rate, noise, plan.steps, plan.delta) if noise else float("inf")


@contextmanager
def wrong(case: Case) -> Iterator[None]:
    """Inside, the project's own step has the fault of `case`."""
    with ExitStack() as stack:
        for name, value in case.fault(case.plan).items():
            stack.enter_context(patch.object(sums if name == "micro_batches" else private_step, name, value))
        yield


def no_noise(_plan: PrivacyPlan) -> Mapping[str, Any]:
    return {"add_noise": lambda total, _std, _generator: dict(total)}


def half_the_noise(_plan: PrivacyPlan) -> Mapping[str, Any]:
    return {"add_noise": lambda total, std, generator: add_noise(total, std / 2, generator)}


def noise_once_per_epoch(plan: PrivacyPlan) -> Mapping[str, Any]:
    steps = round(1 / plan.sample_rate)
    kept: list[Any] = []  # the generator's state at each step's noise

    def mutant(total: Mapping[str, Tensor], std: float, generator: Any) -> dict[str, Tensor]:
        kept.append(kept[-1] if len(kept) % steps else generator.bit_generator.state)
        generator.bit_generator.state = kept[-1]
        return add_noise(total, std, generator)

    return {"add_noise": mutant}


def times_the_rate(_plan: PrivacyPlan, times: int = 3) -> Mapping[str, Any]:
    return {"poisson_draw": lambda n, q, generator: poisson_draw(n, min(1.0, times * q), generator)}


def clipped_by_micro_batch(_plan: PrivacyPlan) -> Mapping[str, Any]:
    """Clip a person who spans micro-batches in each of them, not once."""

    def mutant(*arguments: Any) -> Iterator[Any]:
        for rows in micro_batches(*arguments):
            yield replace(rows, last_continues=False)

    return {"micro_batches": mutant}


def draws_clipped_apart(_plan: PrivacyPlan) -> Mapping[str, Any]:
    """Clip each draw as if it were a unit: the released code's fault, here with any kind of clipping."""

    def mutant(units: Any, k: int, rows: int, device: Any) -> Iterator[Any]:
        yield from micro_batches([[picture] for unit in units for picture in unit for _ in range(k)], 1, rows, device)

    return {"micro_batches": mutant}


def divided_by_the_true_batch(_plan: PrivacyPlan) -> Mapping[str, Any]:
    units: list[int] = []

    def watched(*arguments: Any) -> Any:
        total, facts = noisy_sum(*arguments)
        units.append(facts.units)
        return total, facts

    def mutant(total: Mapping[str, Tensor], plan: PrivacyPlan) -> dict[str, Tensor]:
        return mean_gradient(total, replace(plan, expected_batch=float(max(1, units[-1]))))

    return {"noisy_sum": watched, "mean_gradient": mutant}


def as_published(eps: float, k: int, public: Mapping[str, Any] = PUBLIC) -> Case:
    """The released code's step with `k` draws, under its own accounting."""
    plan = published_plan(eps=eps, k=k, unit="picture", **public)
    return Case(f"published accounting, k={k}", plan, jump=k, convicted_by="bound" if k > 2 else "jump")


def cases(eps: float, public: Mapping[str, Any] = PUBLIC) -> list[Case]:
    """The right step, and each fault, at a target of `eps`."""

    def ours(k: int = 1, unit: str = "picture", clipping: str = FLAT) -> PrivacyPlan:
        return calibrate(eps=eps, k=k, unit=unit, clipping=clipping, **public)

    person = ours(unit="person")
    cut = PERSON / PERSON_ROWS
    return [
        Case("right, k=1", ours()),
        Case("right, k=4", ours(k=4)),
        Case("right, person", person),
        Case("right, automatic clipping", ours(clipping=AUTOMATIC)),
        Case("no noise", ours(), no_noise, noise=0.0, convicted_by="bound"),
        *(as_published(eps, k, public) for k in PUBLISHED),
        Case("noise reused once per epoch", ours(), noise_once_per_epoch, noise=0.0, convicted_by="bound"),
        Case("person clipped by micro-batch", person, clipped_by_micro_batch, jump=cut, convicted_by="jump"),
        Case(
            "automatic clipping of each draw", ours(4, clipping=AUTOMATIC), draws_clipped_apart, 4, convicted_by="jump"
        ),
        Case("3 q drawn, q accounted", ours(), times_the_rate, rate=3.0, convicted_by="jump"),
        Case("noise sigma/2", ours(), half_the_noise, noise=0.5, convicted_by="noise"),
        Case("divided by the true batch", ours(), divided_by_the_true_batch, convicted_by="worlds"),
    ]
