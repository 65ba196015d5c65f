"""The result of a comparison, in sentences made from its numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dp_lora.study.comparisons import NO_PRIVACY, Comparison, Condition
from dp_lora.study.scores import SCORES, Score
from dp_lora.study.statistics import Mean, difference, mean


@dataclass(frozen=True)
class Finding:
    """One sentence without its full stop; `sure`: its interval does not hold 0."""

    text: str
    sure: bool


def scores_of(some: Sequence[Condition]) -> list[Score]:
    """The known scores that at least one condition has, in the report's order."""
    return [score for score in SCORES if any(one.values(score.metric) for one in some)]


def finding(comparison: Comparison, score: Score) -> Finding | None:
    """One sentence: the largest difference that is seen, with its uncertainty. None if nothing can be compared.

    Of epsilon: from the smallest to the largest finite one. Otherwise: against the condition that other groups share.
    """
    scored = [one for one in comparison.conditions if one.values(score.metric)]
    if comparison.of_epsilon:
        finite = _finite(comparison, score)
        if len(finite) > 1:
            return _sentence(comparison, score, finite[0], finite[-1])
        return _sentence(comparison, score, scored[0], scored[-1]) if len(scored) > 1 else None
    own = comparison.conditions[comparison.own]
    others = [one for one in scored if one is not own]
    if not own.values(score.metric) or not others:
        return None
    found = [(one, _change(comparison, score, own, one)) for one in others]
    sure = [(one, change) for one, change in found if _resolved(change)]
    widest = max(sure or found, key=lambda pair: abs(pair[1].value))[0]
    return _sentence(comparison, score, own, widest)


def cost_of_privacy(comparison: Comparison, score: Score) -> Finding | None:
    """One sentence: the largest finite epsilon beside no privacy. None where one of the two was not scored."""
    finite = _finite(comparison, score)
    without = [one for one in comparison.conditions if one.values(score.metric) and one.eps == math.inf]
    if not comparison.of_epsilon or not finite or not without:
        return None
    return _sentence(comparison, score, finite[-1], without[0])


def beside_lines(comparison: Comparison, score: Score) -> list[Finding]:
    """A sentence for each reference of a score: how far the smallest finite epsilon is from it, run by run."""
    finite = _finite(comparison, score)
    if not comparison.of_epsilon or not finite:
        return []
    least, found = finite[0], []
    for metric, said in score.references.items():
        above = least.above(score.metric, metric)
        if not above:
            continue
        side = 1 if sum(above) >= 0 else -1
        change = mean([side * value for value in above], pool=comparison.spread_above(score.metric, metric))
        size = f"{score.shown(change.value)} {score.unit}".strip()
        where = f'{_named(score)} {_at(comparison, least)} is {size} {"above" if side > 0 else "below"} "{said}"'
        shown = f"{where} ({_interval(score, change)})" if change.low is not None else f"{where}; {_unsure(change)}"
        found.append(Finding(shown, _resolved(change)))
    return found


def _finite(comparison: Comparison, score: Score) -> list[Condition]:
    """The scored conditions that have an epsilon, no privacy left out, in their order."""
    scored = [one for one in comparison.conditions if one.values(score.metric)]
    return [one for one in scored if one.eps is not None and one.eps != math.inf]


def _named(score: Score) -> str:
    name = score.short.removesuffix(", %")
    return name[0].upper() + name[1:]


def _interval(score: Score, change: Mean) -> str:
    assert change.low is not None
    assert change.high is not None
    return f"95% interval {score.shown(change.low)} to {score.shown(change.high)}"


def _unsure(change: Mean) -> str:
    return f"{'one seed' if change.n == 1 else 'equal seeds'}, so no interval"


def _change(comparison: Comparison, score: Score, start: Condition, end: Condition) -> Mean:
    return difference(start.values(score.metric), end.values(score.metric), comparison.spread(score.metric))


def _resolved(change: Mean) -> bool:
    return change.low is not None and change.high is not None and not change.low <= 0 <= change.high


def _sentence(comparison: Comparison, score: Score, start: Condition, end: Condition) -> Finding:
    before, after = start.values(score.metric), end.values(score.metric)
    change = _change(comparison, score, start, end)
    name = _named(score)
    first, second = (score.shown(sum(values) / len(values)) for values in (before, after))
    places = f"from {first} {_at(comparison, start)} to {second} {_at(comparison, end)}"
    size = f"{score.shown(abs(change.value))} {score.unit}".strip()
    if change.low is None or change.high is None:
        verb = "does not change" if change.value == 0 else f"goes {'up' if change.value > 0 else 'down'} by {size}"
        return Finding(f"{name} {verb}, {places}; {_unsure(change)}", sure=False)
    interval = _interval(score, change)
    if not _resolved(change):
        return Finding(f"{name} shows no sure difference, {places} ({interval})", sure=False)
    return Finding(f"{name} {'rises' if change.value > 0 else 'falls'} by {size}, {places} ({interval})", sure=True)


def _at(comparison: Comparison, condition: Condition) -> str:
    shown = comparison.shown(condition)
    return "without privacy" if shown == NO_PRIVACY else f"at {shown}"
