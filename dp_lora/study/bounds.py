"""Is epsilon true: the epsilon claimed for a step, the bound by its noise, and an audit's lower bound."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dp_lora.errors import InputError
from dp_lora.privacy.accounting import spent
from dp_lora.privacy.audit_record import settings_digest
from dp_lora.privacy.plan import PER_UNIT, PUBLISHED, PrivacyPlan
from dp_lora.privacy.published import claimed_at
from dp_lora.study.audits import plans_of
from dp_lora.study.rows import Row

UNKNOWN = "unknown"
WORDS = {PER_UNIT: "clipped per unit", PUBLISHED: "draws clipped apart", UNKNOWN: "other settings"}


@dataclass(frozen=True)
class Bounds:
    """Epsilons of one kind of step. `measured`: at least this, at 95% confidence; `ceiling`: no audit shows more."""

    accounting: str
    k: int | None  # None: an audit of settings that the study does not have
    delta: float
    claimed: float
    bounded: float | None
    measured: float | None = None
    ceiling: float | None = None
    refuted: bool = False

    @property
    def name(self) -> str:
        draws = "" if self.k is None else f", k {self.k}"
        return f"{WORDS[self.accounting]}{draws}"

    @property
    def short(self) -> bool:
        """Whether the bound by the noise is clearly above the claim."""
        return self.bounded is not None and self.bounded > 1.05 * self.claimed

    @property
    def verdict(self) -> str:
        """What an audit says of the claim, in words."""
        if self.measured is None:
            return "not audited"
        if self.refuted:
            return "refuted"
        return "cannot refute" if self.ceiling is not None and self.ceiling <= self.claimed else "not refuted"

    @property
    def epsilons(self) -> dict[str, float]:
        """The epsilons to draw: above 0, finite, and the bound only if it is `short`."""
        found = {"measured": self.measured, "claimed": self.claimed, "bounded": self.bounded if self.short else None}
        return {name: value for name, value in found.items() if value is not None and 0 < value < math.inf}


def bounds_of(rows: Iterable[Row], audits: Sequence[Mapping[str, Any]]) -> list[Bounds]:
    """Bounds of all audits, and of the private plans with k above 1 as the released code would clip and account.

    Guarantee: none beyond that of `accounting.spent`, for the bounded ones.
    """
    rows = list(rows)
    # Opacus' PRV takes seconds for a plan of the released code: only an audit needs it, as a statement has its numbers
    plans = _plans(row for row in rows if audits or not _stated(row))
    found = [entry for entry in (_measured(plans, audit) for audit in audits) if entry is not None]
    found += [stated for stated in map(_stated, rows) if stated is not None]
    found += [_published(plan) for plan in plans if plan.accounting == PUBLISHED and plan.k > 1]
    first: dict[tuple[str, int | None, str, float | None], Bounds] = {}
    audited = {_key(entry)[:3] for entry in found if entry.measured is not None}
    for entry in found:
        if entry.measured is not None or _key(entry)[:3] not in audited:
            first.setdefault(_key(entry), entry)
    return sorted(first.values(), key=lambda one: (one.accounting, one.k or 0, one.claimed))


def _key(one: Bounds) -> tuple[str, int | None, str, float | None]:
    """Equal for two that say the same: PLD and PRV differ in the third digit of a claim."""
    return one.accounting, one.k, f"{one.claimed:.2g}", one.measured


def _stated(row: Row) -> Bounds | None:
    """The bounds that a member with the released accounting states itself."""
    said = row.statement
    if "claimed_epsilon" not in said:
        return None
    return Bounds(PUBLISHED, said["k"], said["delta"], said["claimed_epsilon"], said["bounded_epsilon"])


def _plans(rows: Iterable[Row]) -> list[PrivacyPlan]:
    """The private plans of all members, and each one's plan of the released code where that has a meaning."""
    found: dict[PrivacyPlan, None] = {}
    for row in rows:
        if row.config is None or math.isinf(row.config.privacy.eps):
            continue
        try:
            found |= dict.fromkeys(plans_of(row.config))
        except InputError:  # there is no plan of these numbers
            continue
    return list(found)


def _published(plan: PrivacyPlan) -> Bounds:
    return Bounds(PUBLISHED, plan.k, plan.delta, claimed_at(plan, plan.delta), spent(plan, plan.steps).epsilon)


def _measured(plans: Iterable[PrivacyPlan], audit: Mapping[str, Any]) -> Bounds | None:
    """An audit's record beside the bound of the plan that it attacked; None for a line that is no record."""
    try:
        claimed, measured, delta = float(audit["claimed"]), float(audit["bound"]["epsilon"]), float(audit["delta"])
        ceiling, refuted = float(audit["ceiling"]), bool(audit["refuted"])
        noise, target = float(audit["noise_multiplier"]), float(audit["target_epsilon"])
        settings, code = audit["settings"], audit["code"]
    except (KeyError, TypeError, ValueError):
        return None
    plan = next((plan for plan in plans if settings_digest(plan, code) == settings), None)
    if plan is None:
        return Bounds(UNKNOWN, None, delta, claimed, None, measured, ceiling, refuted)
    attacked = replace(plan, noise_multiplier=noise, target_epsilon=target, delta=delta)
    bounded = spent(attacked, attacked.steps).epsilon
    return Bounds(plan.accounting, plan.k, delta, claimed, bounded, measured, ceiling, refuted)
