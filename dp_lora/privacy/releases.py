"""Cost of publishing several private fine-tunings of the same private pictures: their steps composed as one run's.

Claim. Let n fine-tunings be fixed beforehand: their plans, settings and seeds, by a study's file. Each reads the same
private data D, draws its batches and its noise by itself, and publishes the result of its steps. Then publishing all n
results is (E, d)-DP, where E is the epsilon at d of the composition of all their steps.

Proof. (1) Each result is a function of the sums that `step.noisy_sum` made of D, and of public values. So all results
together are post-processing of all noisy sums of all n runs. (2) A step's noisy sum is dominated, for D against D
without one unit and for D against D with one unit more, by the pair of its Poisson-subsampled Gaussian
(`accounting.spent`, `loss_distribution.Pair`). This holds whatever was published before, as each step may see earlier
ones. (3) Neighbours D and D' differ by one unit, the same one in all n runs, on the same side in all of them. So all
steps together are dominated by the product of their pairs of that side (Zhu, Dong and Wang 2022, theorem 10), whose
loss is the sum of independent losses: what `loss_distribution` convolves. Epsilon is the larger one of both sides.

E is less than the sum of the epsilons, which `composition.compose` gives and which needs nothing but these. E counts
runs that were fixed beforehand. Whoever adds a run to the study in view of an earlier result has another study.

Members that share one fine-tuning (one ledger, one adapter; only sampling or scoring differs) are one release: samples
from an adapter are post-processing. Scores are no releases: they read private pictures without noise, and stay with the
operator. The cost of members without a guarantee (eps=inf, published accounting) has no bound.
"""

from collections.abc import Iterable, Sequence

from dp_lora.errors import InputError
from dp_lora.privacy.accounting import Spent, spent_by_all
from dp_lora.privacy.composition import ReleaseCost, compose
from dp_lora.privacy.plan import PrivacyPlan


def all_releases(plans: Sequence[PrivacyPlan], before: Iterable[ReleaseCost] = ()) -> Spent:
    """Epsilon and delta of publishing the results of all plans, with the earlier releases `before`.

    `before`: releases whose cost is added, earlier fine-tunings and bases, each counted once. Delta is the largest of
    the plans' own, plus theirs. InputError for a plan without a guarantee, and for plans of different units or
    relations, which have no common epsilon.

    Guarantee: the claim at the head of this file, with one unit and relation for all; `before` is added by
    `composition.compose`.
    """
    if not all(plan.guaranteed for plan in plans):
        raise InputError("a fine-tuning without a guarantee has no epsilon that could be added up; leave it out")
    if len({(plan.unit, plan.relation) for plan in plans}) > 1:
        raise InputError("privacy.unit: fine-tunings that protect different units have no epsilon together")
    own = spent_by_all(plans, max((plan.delta for plan in plans), default=0.0)) if plans else Spent(0.0, 0.0)
    parts = list(dict.fromkeys(before))
    epsilon, delta = compose([*parts, ReleaseCost(own.epsilon, own.delta)])
    return Spent(epsilon, delta)
