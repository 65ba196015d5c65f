"""Cost of publishing several releases made from the same private data: basic composition.

Claim (Dwork and Roth 2014, theorem B.1). Let M1 be (e1, d1)-DP, and let M2, which may read what M1 released, be
(e2, d2)-DP for every value y of it, both under one neighbouring relation with one unit. Then both together are
(e1 + e2, d1 + d2)-DP. By induction n releases are (sum of e, sum of d)-DP, whatever else was chosen in view of
earlier ones: what is trained, with which settings, from which start. Where e2, d2 or the number of releases is chosen
so too, the claim holds for a total (E, D) that was fixed beforehand and that the sums never pass: then e2 <= E - e1 and
d2 <= D - d1 for every y, and (2) and (3) go through with these in their place. Whoever fixes no total beforehand, and
adds a release because of an earlier result, knows the sum but has no such theorem for it.

Proof. Let D and D' be neighbours, P and P' the laws of M1 on them, S a set of pairs, S_y = {z: (y, z) in S}.
(1) M1 is (e1, d1)-DP, so P <= exp(e1) P' + m for a measure m >= 0 of total mass at most d1.
(2) Pr[(M1, M2)(D) in S] = integral of Pr[M2(D, y) in S_y] dP
    <= d2 + integral of min(1, exp(e2) Pr[M2(D', y) in S_y]) dP.
(3) By (1) the last integral is at most exp(e1 + e2) Pr[(M1, M2)(D') in S] + d1: under m the integrand is at most 1.

Tighter theorems exist; this one needs nothing of the parts but their epsilon and delta.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dp_lora.errors import InputError
from dp_lora.privacy.plan import PrivacyPlan


@dataclass(frozen=True)
class ReleaseCost:
    """Cost (epsilon, delta) of one release. Parts may be added only if unit and neighbouring relation agree."""

    epsilon: float
    delta: float
    run_id: str | None = None  # the random id of a fine-tuning, as in its privacy.json
    base: str | None = None  # or the digest of a base model's folder

    def __str__(self) -> str:
        name = f"run {self.run_id}" if self.run_id else f"base {self.base}"
        return f"{name}: epsilon {self.epsilon:.6g}, delta {self.delta:.6g}"

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def compose(parts: Iterable[ReleaseCost]) -> tuple[float, float]:
    """Sum of the epsilons and sum of the deltas; (0, 0) for none. InputError where the deltas reach 1: no guarantee.

    Guarantee: publishing all parts is (epsilon, delta)-DP where each part costs what it states, all have one unit and
    one neighbouring relation, and their epsilons, deltas and number, or totals that they never pass, were fixed
    beforehand.
    """
    found = list(parts)
    epsilon, delta = math.fsum(part.epsilon for part in found), math.fsum(part.delta for part in found)
    if delta >= 1:
        raise InputError(f"the deltas of {len(found)} releases add up to {delta:g}: must be below 1; lower delta")
    return epsilon, delta


def together(base: Sequence[ReleaseCost], parent: Sequence[ReleaseCost]) -> tuple[ReleaseCost, ...]:
    """Costs before a fine-tuning: its parent's parts, and its base's where the parent's parts do not hold them.

    A base is known by the digest of its folder: it is one release, however many fine-tunings started from it.

    Guarantee: every release is in the result; only an equal part of one base is not counted twice.
    """
    return (*parent, *(part for part in base if part not in parent))


def spent_by(stated: Mapping[str, Any], plan: PrivacyPlan) -> tuple[float, float] | None:
    """A statement's epsilon and delta, to be added to the plan's; None for another unit or relation, or no bound.

    Guarantee: the result is a bound for the plan's own unit and relation, as far as the statement is true.
    """
    if stated.get("unit") != plan.unit or stated.get("relation") != plan.relation:
        return None
    epsilon, delta = stated.get("epsilon"), stated.get("delta")
    if not isinstance(epsilon, int | float) or not isinstance(delta, int | float):
        return None
    return (float(epsilon), float(delta)) if 0 <= epsilon < math.inf and 0 <= delta < 1 else None


def base_privacy(info: Mapping[str, Any], plan: PrivacyPlan) -> tuple[float, float]:
    """Epsilon and delta that the base model has spent before, by its model.json; (0, 0) for a public one.

    Raises InputError, where the result is to be released, for a base that is non-private or of unknown status, or whose
    unit of privacy or neighbouring relation is not the plan's.

    Guarantee: that of `spent_by`, as far as model.json is true.
    """
    status = info.get("privacy_status", "unknown")
    if status == "public" or not plan.guaranteed:
        return 0.0, 0.0
    before = info.get("privacy")
    if status == "private-dp" and isinstance(before, dict):
        if (found := spent_by(before, plan)) is not None:
            return found
        raise InputError(
            f"model.base: its model.json states privacy {before}: needs epsilon, delta, unit={plan.unit} and "
            f"relation={plan.relation} to be added to this run's"
        )
    raise InputError(
        f"model.base: its model.json says privacy_status {status}: what it leaked of its own training pictures has no "
        "bound, so no release can be made from it; use a public base, or eps=inf"
    )


def base_parts(info: Mapping[str, Any], digest: Callable[[], str], plan: PrivacyPlan) -> tuple[ReleaseCost, ...]:
    """The base's cost by `base_privacy`; none for a public one. `digest` gives its folder's digest, where needed.

    Guarantee: that of `base_privacy`.
    """
    epsilon, delta = base_privacy(info, plan)
    return (ReleaseCost(epsilon, delta, base=digest()),) if epsilon or delta else ()


def parent_parts(statement: Mapping[str, Any], plan: PrivacyPlan, shown: str) -> tuple[ReleaseCost, ...]:
    """The parts of an earlier fine-tuning's privacy.json, its own parents' among them.

    `shown` names the parent as it was typed. Raises InputError where it is not private, where unit or relation are not
    the plan's, and where its parts do not add up to its stated cost.

    Guarantee: the parts compose to what the statement says, for the plan's own unit and relation.
    """
    if statement.get("private") is not True:
        raise InputError(f"{shown}: is not private, so nothing bounds what it leaked; name a release/ folder")
    spent = spent_by(statement, plan)
    if spent is None:
        raise InputError(
            f"{shown}: states epsilon {statement.get('epsilon')}, delta {statement.get('delta')}, "
            f"unit={statement.get('unit')}, relation={statement.get('relation')}: must be a bound with "
            f"unit={plan.unit}, relation={plan.relation} to be added to this run's"
        )
    try:
        # a release from before the field `parts` states one sum
        stated = statement.get("parts", [{"epsilon": spent[0], "delta": spent[1], "run_id": statement.get("run_id")}])
        parts = tuple(ReleaseCost(**part) for part in stated)
        whole = all(min(part.epsilon, part.delta) >= 0 for part in parts) and parts and compose(parts) == spent
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise InputError(f"{shown}: the parts in its privacy.json do not add up to its epsilon and delta; restore it")
    return parts
