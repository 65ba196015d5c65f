"""Lower bounds on epsilon from an audit's guesses: which epsilons they refute, and at which confidence.

One run: m canaries, each in or out by a fair coin of its own. The auditor sees what the mechanism published, guesses r
of the m coins and is right v times. Claim (Steinke, Nasr and Jagielski 2023, theorem 5.2; here its computation in
their appendix D): if the mechanism is (eps, delta)-DP under add-or-remove-one unit, then

    Pr[v or more right] <= beta + 2 m delta alpha,

beta = Pr[Binomial(r, q) >= v], alpha = max over i of Pr[v - i <= Binomial(r, q) < v] / i, q = e^eps / (1 + e^eps). An
eps for which the right side is at most a is refuted at confidence 1 - a.

The claim needs three things: the coins are fair, independent, and seen by nobody but the mechanism; the guesses depend
on the published results alone; r is fixed beforehand. Where several scores and several r are tried, each pays its share
of a (Bonferroni), and the largest bound counts. The canaries may be anything: weak ones give a weak bound, never a
wrong one.

Two worlds: runs with and without one unit. Clopper and Pearson's intervals bound how often either world is guessed
'with', and (eps, delta)-DP says: rate in runs with <= e^eps * rate in runs without + delta.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95
# shares of the canaries that are guessed in and out, fixed beforehand; each pays its share of the error
GUESSES = (*((share, share) for share in (0.01, 0.025, 0.05, 0.1, 0.2, 0.4)), (0.1, 0.0), (0.4, 0.0))
HIGHEST = 30.0  # of a bound: no audit comes near it
PRECISE = 1e-3  # of a bound, towards zero


@dataclass(frozen=True)
class Bound:
    """The largest refuted epsilon, and the guesses that refute it; 0 where nothing is refuted."""

    epsilon: float
    score: str = ""
    guesses: int = 0
    right: int = 0


def p_value(m: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """The claim's right side, cut to [0, 1], for `right` or more right ones of `guesses` guesses on `m` canaries.

    Guarantee: no (epsilon, delta)-DP mechanism gives so many with a higher probability.
    """
    fair = 1 / (1 + math.exp(-epsilon))
    beta = float(stats.binom.sf(right - 1, guesses, fair))
    below = np.cumsum(stats.binom.pmf(right - np.arange(1, right + 1), guesses, fair))
    alpha = float(np.max(below / np.arange(1, right + 1), initial=0.0))
    return min(1.0, beta + 2 * m * delta * alpha)


@functools.lru_cache(maxsize=4096)
def one_run_bound(m: int, guesses: int, right: int, delta: float, alpha: float) -> float:
    """The largest epsilon, to within 0.001 below, that `right` of `guesses` guesses refute at confidence 1 - `alpha`.

    Guarantee: an (epsilon, delta)-DP mechanism gives a larger number with probability at most `alpha`.
    """
    if right <= guesses / 2 or p_value(m, guesses, right, 0.0, delta) > alpha:
        return 0.0
    low, high = 0.0, HIGHEST
    while high - low > PRECISE:
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(m, guesses, right, middle, delta) <= alpha else (low, middle)
    return low


def best_bound(
    scores: Mapping[str, NDArray[np.float64]], coins: NDArray[np.bool_], delta: float, confidence: float = CONFIDENCE
) -> Bound:
    """The largest bound over all `scores` {name: (m,), high where in} and GUESSES; `coins` (m,) say who was in.

    Guarantee: that of `one_run_bound`, for all scores and guesses together, where the scores were fixed beforehand.
    """
    m, best = len(coins), Bound(0.0)
    alpha = (1 - confidence) / (len(scores) * len(GUESSES))
    for name, score in scores.items():
        # ties in random order: in the canaries' own order a score that knows nothing could learn from their positions
        order = np.lexsort((np.random.default_rng(0).random(m), score))
        for share_in, share_out in GUESSES:
            high, low = int(share_in * m), int(share_out * m)
            right = int(coins[order[m - high :]].sum()) + int((~coins[order[:low]]).sum())
            bound = one_run_bound(m, high + low, right, delta, alpha)
            if bound > best.epsilon:
                best = Bound(bound, name, high + low, right)
    return best


def ceiling(m: int, delta: float, n_scores: int, confidence: float = CONFIDENCE) -> float:
    """The bound of `best_bound` where every guess is right.

    Guarantee: no audit of `m` canaries with so many scores gives a larger bound.
    """
    alpha = (1 - confidence) / (n_scores * len(GUESSES))
    counts = {int(share_in * m) + int(share_out * m) for share_in, share_out in GUESSES}
    return max(one_run_bound(m, count, count, delta, alpha) for count in counts)


def two_worlds_bound(
    with_unit: NDArray[np.float64], without: NDArray[np.float64], delta: float, confidence: float = CONFIDENCE
) -> float:
    """Lower bound on epsilon from a score of independent runs with (n,) and without (n,) one unit.

    The threshold, and its side, are picked on the first half of the runs; the rates are those of the second half.

    Guarantee: where the runs are independent, an (epsilon, delta)-DP mechanism gives a larger number with probability
    at most 1 - `confidence`.
    """
    half = len(with_unit) // 2
    picked, counted = (
        [sign * world[part] for sign in (1, -1) for world in (with_unit, without)]
        for part in (slice(None, half), slice(half, None))
    )
    best, bound = -1.0, 0.0
    for first, second in ((0, 1), (2, 3)):  # a unit raises the score, or lowers it
        seen = np.sort(np.concatenate([picked[first], picked[second]]))
        cuts = (seen[1:] + seen[:-1]) / 2  # midway: a cut at a run's own score may cut off runs like it
        found = _rates_bound(_above(picked[first], cuts), _above(picked[second], cuts), half, delta, confidence)
        if found.max() > best:
            best = float(found.max())
            cut = cuts[[int(found.argmax())]]
            hits, misses = _above(counted[first], cut), _above(counted[second], cut)
            bound = float(_rates_bound(hits, misses, len(with_unit) - half, delta, confidence)[0])
    return bound


def _above(scores: NDArray[np.float64], cuts: NDArray[np.float64]) -> NDArray[np.int64]:
    """How many of the scores are above each of the cuts."""
    return len(scores) - np.searchsorted(np.sort(scores), cuts, side="right")


def _rates_bound(
    hits: NDArray[np.int64], misses: NDArray[np.int64], n: int, delta: float, confidence: float
) -> NDArray[np.float64]:
    """Lower bounds on epsilon where `hits` of n runs with the unit, and `misses` of n without, are guessed to be with.

    Half of the error is for each of the two rates.
    """
    alpha = (1 - confidence) / 2
    rate = np.where(hits > 0, stats.beta.ppf(alpha, np.maximum(hits, 1), n - hits + 1), 0.0) - delta
    false = np.where(misses < n, stats.beta.ppf(1 - alpha, misses + 1, np.maximum(n - misses, 1)), 1.0)
    return np.log(np.maximum(rate / false, 1.0))
