"""An audit of the private step in one run: whether its output refutes the epsilon that its plan claims.

What an audit can show: that a claim is false. A lower bound above the claimed epsilon, at 95% confidence, is a proof of
a fault, whatever the fault is. What it cannot show: that a claim is true. A bound below the claim says that these
canaries, scores and guesses found nothing, and even perfect guesses give no more than the ceiling.

Direct numbers (audit_scores.py) stand beside the bound: each measures one thing that the proof in step.py needs. They
convict where the bound is too blunt (a fault of a factor of two), and say what is wrong.

Scores, guesses and direct numbers are fixed beforehand.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dp_lora.privacy.accounting import pld_epsilon
from dp_lora.privacy.audit_bound import CONFIDENCE, Bound, best_bound, ceiling, two_worlds_bound
from dp_lora.privacy.audit_canaries import observe, spreads, toss
from dp_lora.privacy.audit_scores import Measured, direct_numbers, divisor_number, scores_of
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.privacy.published import claimed_at
from dp_lora.privacy.randomness import Randomness


@dataclass(frozen=True)
class Audit:
    """Results of one audit, all computed from made-up units."""

    canaries: int
    delta: float
    claimed: float  # epsilon of the plan at `delta`
    bound: Bound
    ceiling: float
    noise: Measured
    lag: Measured
    jump: Measured
    divisor: Measured
    worlds_bound: float  # lower bound on the epsilon of one step in which all take part, by its divisor
    worlds_claimed: float

    @property
    def faults(self) -> tuple[str, ...]:
        """The findings that refute the claim, in words; empty where nothing does.

        Guarantee: a right step shows a fault with probability at most 1 - CONFIDENCE for the bound, the same for the
        two worlds, and about 1e-4 for each direct number.
        """
        found = []
        if self.bound.epsilon > self.claimed:
            found.append(f"epsilon is at least {self.bound.epsilon:.3g}, claimed {self.claimed:.3g}")
        if self.noise.is_below():
            found.append(f"noise is {self.noise} of what is stated")
        if self.lag.is_above() or self.lag.is_below():
            found.append(f"noise of successive steps is correlated by {self.lag}")
        if self.jump.is_above():
            found.append(f"rate times jump is {self.jump} times what is accounted")
        if self.worlds_bound > self.worlds_claimed or self.divisor.is_above() or self.divisor.is_below():
            found.append(f"the divisor tells who took part: spreads differ by {self.divisor}")
        return tuple(found)

    @property
    def refuted(self) -> bool:
        """True where the step does not do what its plan says.

        Guarantee: that of `faults`.
        """
        return bool(self.faults)

    @property
    def verdict(self) -> str:
        """One line: refuted, not refuted, or unable to refute anything.

        Guarantee: it never says "not refuted" where the bound could not have passed the claim.
        """
        if self.refuted:
            return f"refuted: {'; '.join(self.faults)}"
        if self.jump.is_below():
            return f"blind: the canaries reach the sum by {self.jump} of what one unit may; the bound says nothing"
        if self.ceiling <= self.claimed:
            return (
                f"cannot refute epsilon {self.claimed:.4g}: even perfect guesses bound it by {self.ceiling:.3g} alone; "
                "the direct numbers are as stated"
            )
        return (
            f"not refuted: epsilon is at least {self.bound.epsilon:.3g} of the claimed {self.claimed:.4g} (perfect "
            f"guesses would give {self.ceiling:.3g}); the direct numbers are as stated"
        )

    def as_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "confidence": CONFIDENCE,
            "refuted": self.refuted,
            "verdict": self.verdict,
        }


def audit_of(
    plan: PrivacyPlan,
    seen: NDArray[np.float64],
    coins: NDArray[np.bool_],
    worlds: tuple[NDArray[np.float64], NDArray[np.float64]],
    delta: float,
) -> tuple[Audit, dict[str, NDArray[np.float64]]]:
    """The audit of the canaries' measurements `seen` (steps, m), and their scores; `worlds` as `spreads` gives them.

    Guarantee: that of `best_bound` and of `two_worlds_bound`: the scores were fixed beforehand.
    """
    found = scores_of(seen, plan.sample_rate, plan.noise_multiplier)
    noise, lag, jump = direct_numbers(seen, coins, plan.sample_rate, plan.noise_multiplier)
    audit = Audit(
        canaries=len(coins),
        delta=delta,
        claimed=claimed_at(plan, delta),
        bound=best_bound(found, coins, delta),
        ceiling=ceiling(len(coins), delta, len(found)),
        noise=noise,
        lag=lag,
        jump=jump,
        divisor=divisor_number(*worlds),
        worlds_bound=two_worlds_bound(*worlds, delta),
        worlds_claimed=pld_epsilon(1.0, plan.noise_multiplier / plan.sensitivity, 1, delta),
    )
    return audit, found


def audit_step(
    plan: PrivacyPlan,
    m: int,
    device: torch.device,
    delta: float | None = None,
    randomness: Randomness = Randomness("audit"),  # noqa: B008 (frozen)
) -> tuple[Audit, dict[str, NDArray[np.float64]], NDArray[np.bool_]]:
    """Audit all steps of `plan` with `m` canaries: the audit, the canaries' scores, and which canaries were in.

    delta: of the claim and of the bound; None: the plan's. InputError for a plan without privacy, which claims nothing.

    Guarantee: no private data are read, and nothing is released; the result is a function of public numbers and fresh
    randomness.
    """
    claimed_at(plan, plan.delta)  # refuses a plan that claims nothing
    coins = toss(m, randomness)
    seen = observe(plan, coins, randomness, device)
    audit, found = audit_of(plan, seen, coins, spreads(plan, randomness, device), delta or plan.delta)
    return audit, found, coins
