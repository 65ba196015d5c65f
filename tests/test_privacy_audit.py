"""The audit convicts each known fault of a private step, convicts no right step, and never claims too much."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.mutants import Case, cases, times_the_rate, wrong
from dp_lora.errors import InputError
from dp_lora.privacy.accounting import calibrate
from dp_lora.privacy.audit import Audit, audit_of, audit_step
from dp_lora.privacy.audit_bound import (
    GUESSES,
    Bound,
    best_bound,
    ceiling,
    one_run_bound,
    p_value,
    two_worlds_bound,
)
from dp_lora.privacy.audit_canaries import canary_units, observe, spreads, toss
from dp_lora.privacy.audit_record import audits_of, record_audit
from dp_lora.privacy.audit_scores import SCORES, Measured, direct_numbers, scores_of
from dp_lora.privacy.published import claimed_at
from dp_lora.privacy.randomness import Randomness
from tests.support.tiny import no_privacy, plan_of

CPU = torch.device("cpu")
SECRET = b"0123456789abcdef"
# fewer and larger steps than mnist5k's, so that an audit takes seconds
PUBLIC = {"delta": 1e-5, "n_public": 4000, "batch_size": 1000, "epochs": 10.0, "max_grad_norm": 0.05}
M = 1000
# even perfect guesses show no more than 4.47 at 1e-5 with as many canaries, and 4.81 at 1e-7 with 1,000
AT_5, MORE = {**PUBLIC, "delta": 1e-7}, 5000
GOLDEN = json.loads((Path(__file__).parent / "data/audit/one_run_bounds.json").read_text())["cases"]
EPSILONS = (1.0, 3.0)
# names, not plans: plans take seconds, and pytest would make them in every process while it collects the tests
RIGHT = ("right, k=1", "right, k=4", "right, person", "right, automatic clipping")
CONVICTED_BY = {
    "no noise": "bound",
    "published accounting, k=2": "jump",
    "published accounting, k=4": "bound",
    "published accounting, k=12": "bound",
    "noise reused once per epoch": "bound",
    "person clipped by micro-batch": "jump",
    "3 q drawn, q accounted": "jump",
    "noise sigma/2": "noise",
    "automatic clipping of each draw": "jump",
    "divided by the true batch": "worlds",
}
AS_PERFECT = ("no noise", "noise reused once per epoch")  # every guess is right


@functools.cache
def cases_at(eps: float) -> dict[str, Case]:
    return {case.name: case for case in cases(eps, PUBLIC)}


def marked(*names: str) -> list:
    """These cases at every epsilon; at eps 1 persons, who take many micro-batches, are slow tests."""
    return [
        pytest.param(eps, name, marks=pytest.mark.slow) if "person" in name and eps == 1 else (eps, name)
        for eps in EPSILONS
        for name in names
    ]


def test_every_case_is_audited_here():
    for eps in EPSILONS:
        convicted = {case.name: case.convicted_by for case in cases_at(eps).values()}
        assert convicted == dict.fromkeys(RIGHT, "") | CONVICTED_BY


def randomness(number: int = 0) -> Randomness:
    return Randomness(f"audit {number}", SECRET)


@functools.cache
def worlds_at(eps: float):
    return spreads(cases_at(eps)["right, k=1"].plan, randomness(), CPU)


@pytest.fixture(scope="module")
def right_worlds():
    return worlds_at(3.0)


def audited(case: Case, worlds, number: int = 0, pictures: int = M) -> Audit:
    m = pictures if case.plan.unit == "picture" else 150
    coins = toss(m, randomness(number))
    with wrong(case):
        seen = observe(case.plan, coins, randomness(number), CPU, others=5)
    return audit_of(case.plan, seen, coins, worlds, case.plan.delta)[0]


# ---------------------------------------------------------------------------- faults are convicted, right steps are not
@pytest.mark.parametrize(("eps", "name"), marked(*(name for name, by in CONVICTED_BY.items() if by != "worlds")))
def test_each_fault_is_convicted_by_the_number_that_is_made_for_it(eps, name, right_worlds):
    case = cases_at(eps)[name]
    audit = audited(case, right_worlds)
    assert audit.refuted
    assert audit.verdict.startswith("refuted: ")
    if case.convicted_by == "bound":
        assert audit.bound.epsilon > audit.claimed
        if name in AS_PERFECT:
            assert audit.bound.epsilon == pytest.approx(audit.ceiling, abs=0.005)
    elif case.convicted_by == "jump":
        assert audit.jump.is_above()
        assert audit.jump.value == pytest.approx(case.jump * case.rate, rel=0.25)
    else:
        assert audit.noise.is_below()
        assert audit.noise.value == pytest.approx(0.5, rel=0.05)
    assert audit.bound.epsilon < case.true_epsilon


def ten_times_the_rate(eps: float, public: dict) -> Case:
    """A thirtieth of the units is accounted in each step, and a third is drawn."""
    plan = calibrate(eps=eps, k=1, unit="picture", **{**public, "batch_size": 133, "epochs": 2.0})
    return Case("10 q drawn", plan, functools.partial(times_the_rate, times=10), rate=10.0)


@functools.cache
def cases_at_5() -> dict[str, Case]:
    return {case.name: case for case in [*cases(5.0, AT_5), ten_times_the_rate(5.0, AT_5)]}


GROSS = ("no noise", "published accounting, k=12", "noise reused once per epoch", "10 q drawn")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["right, k=1", *GROSS])
def test_at_eps_5_too_the_bound_exceeds_the_claim_of_a_gross_fault_and_of_no_right_step(name, right_worlds):
    audit = audited(cases_at_5()[name], right_worlds, pictures=MORE)
    assert audit.claimed == pytest.approx(5.0, rel=0.01)
    assert audit.bound.epsilon <= ceiling(MORE, 1e-7, SCORES)
    assert (audit.bound.epsilon > audit.claimed) == (name in GROSS)


def test_ten_times_the_accounted_rate_is_convicted_by_the_bound_at_eps_1(right_worlds):
    audit = audited(ten_times_the_rate(1.0, PUBLIC), right_worlds)
    assert audit.bound.epsilon > audit.claimed == pytest.approx(1.0, rel=0.01)


def test_the_ceilings_that_the_page_on_audits_tells_are_these():
    page = (Path(__file__).parent.parent / "docs/audit.md").read_text(encoding="utf-8")
    for m in (1000, 5000, 20_000, 100_000):
        for delta in (1e-5, 1e-7):
            assert f"{ceiling(m, delta, SCORES):.2f}" in page


@pytest.mark.parametrize("eps", EPSILONS)
def test_noise_that_is_used_again_is_correlated_and_seen_in_differences(eps, right_worlds):
    audit = audited(cases_at(eps)["noise reused once per epoch"], right_worlds)
    assert "differences" in audit.bound.score
    assert audit.lag.is_above()
    assert audit.lag.value == pytest.approx(0.75, abs=0.1)  # three of four steps repeat the noise of the one before


@pytest.mark.parametrize("eps", EPSILONS)
def test_a_mean_over_the_true_batch_is_convicted_by_two_worlds_while_the_canaries_are_blind(eps):
    case = cases_at(eps)["divided by the true batch"]
    with wrong(case):
        worlds = spreads(case.plan, randomness(), CPU)
        coins = toss(200, randomness())
        seen = observe(case.plan, coins, randomness(), CPU, others=10)
    audit, _ = audit_of(case.plan, seen, coins, worlds, case.plan.delta)
    assert audit.worlds_bound == pytest.approx(3.98, abs=0.01)
    assert audit.worlds_bound > audit.worlds_claimed
    assert audit.divisor.value == pytest.approx(2.0, rel=0.02)
    assert audit.bound.epsilon <= audit.claimed
    assert not audit.jump.is_above()
    assert "the divisor tells who took part" in audit.verdict
    right, _ = audit_of(case.plan, seen, coins, worlds_at(eps), case.plan.delta)
    assert right.worlds_bound == 0
    assert not right.refuted


@pytest.mark.parametrize(("eps", "name"), marked(*RIGHT))
def test_the_right_step_is_not_convicted(eps, name, right_worlds):
    audit = audited(cases_at(eps)[name], right_worlds)
    assert not audit.refuted
    # persons have fewer canaries here, so even perfect guesses would not refute eps 3
    assert audit.verdict.startswith("not refuted: " if audit.claimed < audit.ceiling else "cannot refute ")
    assert audit.bound.epsilon <= audit.claimed
    assert not audit.jump.is_below()  # the canaries do reach the sum


@pytest.mark.slow
@pytest.mark.parametrize("eps", EPSILONS)
@pytest.mark.parametrize("name", ["right, k=1", "right, k=4"])
def test_the_right_step_is_not_convicted_in_twenty_runs_of_fresh_entropy(eps, name):
    plan = cases_at(eps)[name].plan
    found = [audit_step(plan, M, CPU)[0] for _ in range(20)]
    assert [audit.verdict for audit in found if audit.refuted] == []
    assert max(audit.bound.epsilon for audit in found) > eps / 15  # the audit is not blind


def test_an_audit_at_another_delta_bounds_the_epsilon_that_the_same_plan_has_there():
    plan = cases_at(3.0)["right, k=1"].plan
    audit, _, _ = audit_step(plan, 200, CPU, 1e-7)
    assert (audit.delta, audit.claimed) == (1e-7, pytest.approx(claimed_at(plan, 1e-7), rel=1e-6))
    assert audit.claimed > 1.1 * plan.target_epsilon
    assert audit.ceiling == ceiling(200, 1e-7, SCORES)


def test_twenty_right_runs_are_not_convicted(right_worlds):
    plan = calibrate(eps=3.0, k=1, unit="picture", **{**PUBLIC, "epochs": 1.0})
    case = dataclasses.replace(cases_at(3.0)["right, k=1"], plan=plan)
    assert [audit.verdict for number in range(20) if (audit := audited(case, right_worlds, number)).refuted] == []


# ---------------------------------------------------------------------------- the bound
@pytest.mark.parametrize("case", range(len(GOLDEN)))
def test_the_bound_is_that_of_another_implementation_on_the_same_scores(case):
    golden = GOLDEN[case]
    inside, outside = np.array(golden["in"]), np.array(golden["out"])
    for one in golden["thresholds"]:
        right, wrong_ = int((inside >= one["threshold"]).sum()), int((outside >= one["threshold"]).sum())
        bound = one_run_bound(golden["m"], right + wrong_, right, golden["delta"], 1 - golden["confidence"])
        assert bound == pytest.approx(one["bound"], abs=2e-3)
        assert bound <= one["bound"] + 1e-5  # rounded towards zero


@pytest.mark.parametrize(("eps", "canaries"), [(1, 10), (5, 446), (10, 65_987)])
def test_so_many_canaries_are_needed_at_least_where_every_guess_is_right(eps, canaries):
    assert one_run_bound(canaries, canaries, canaries, 0.0, 0.05) >= eps - 1.1e-3
    assert one_run_bound(canaries - 1, canaries - 1, canaries - 1, 0.0, 0.05) < eps


def test_the_p_value_is_the_binomial_tail_and_delta_adds_to_it():
    assert p_value(100, 50, 40, 1.0, 0.0) == pytest.approx(stats.binom.sf(39, 50, math.e / (1 + math.e)))
    grid = [p_value(100, 50, 40, 1.0, delta) for delta in (0.0, 1e-5, 1e-3, 0.1)]
    assert grid == sorted(grid)
    assert grid[1] < grid[2]
    # delta's term by its definition: no window of i right guesses below v has more probability than i alpha
    fair = 1 / (1 + math.exp(-1.0))
    alpha = max(sum(stats.binom.pmf(40 - j, 50, fair) for j in range(1, i + 1)) / i for i in range(1, 41))
    assert grid[2] - grid[0] == pytest.approx(2 * 100 * 1e-3 * alpha)


def test_scores_that_know_nothing_give_a_bound_above_0_in_at_most_one_run_of_twenty():
    generator = np.random.default_rng(1)
    above = 0
    for _ in range(1000):
        coins = generator.random(500) < 0.5
        found = {str(number): generator.standard_normal(500) for number in range(SCORES)}
        above += best_bound(found, coins, 1e-5).epsilon > 0
    assert above <= 50


def test_scores_that_are_all_equal_give_no_bound_although_canaries_stand_in_order():
    coins = np.arange(1000) >= 500
    assert best_bound({"none": np.zeros(1000)}, coins, 1e-5).epsilon == 0


def test_two_worlds_that_are_alike_give_a_bound_above_0_in_at_most_one_of_twenty():
    generator = np.random.default_rng(2)
    worlds = [(generator.standard_normal(100), generator.standard_normal(100)) for _ in range(300)]
    assert sum(two_worlds_bound(*pair, 1e-5) > 0 for pair in worlds) <= 15


def test_the_ceiling_is_what_perfect_scores_reach_and_falls_or_rises_with_more_canaries_by_delta():
    coins = np.random.default_rng(3).random(M) < 0.5
    assert best_bound({str(number): coins.astype(float) for number in range(SCORES)}, coins, 1e-5).epsilon == (
        pytest.approx(ceiling(M, 1e-5, SCORES), abs=1e-9)
    )
    high = [ceiling(m, 1e-5, SCORES) for m in (1000, 5000, 20_000)]
    assert high == pytest.approx([4.47, 4.38, 4.27], abs=0.01)
    low = [ceiling(m, 1e-7, SCORES) for m in (1000, 5000, 20_000)]
    assert low == sorted(low)
    assert low[-1] > 7


def test_guesses_never_overlap_and_no_score_is_tried_unpaid():
    assert all(share_in + share_out <= 1 for share_in, share_out in GUESSES)
    assert len(scores_of(np.zeros((3, 4)), 0.5, 1.0)) == SCORES


# ---------------------------------------------------------------------------- canaries
def test_coins_are_fair_fresh_by_default_and_replayed_with_a_secret():
    assert abs(toss(100_000, Randomness("audit")).mean() - 0.5) < 0.008
    assert not np.array_equal(toss(100, Randomness("audit")), toss(100, Randomness("audit")))
    assert np.array_equal(toss(100, randomness()), toss(100, randomness()))


@pytest.mark.parametrize(("k", "unit"), [(1, "picture"), (4, "picture"), (2, "person")])
def test_a_canary_moves_the_sum_by_one_clip_along_its_own_coordinate_and_others_do_not(k, unit):
    """At rate 1 with almost no noise, canaries that are in measure 1 and all others 0, for every k and unit."""
    plan = plan_of(sample_rate=1.0, noise_multiplier=1e-6, k=k, unit=unit, steps=2, target_epsilon=5.0)
    coins = toss(60, randomness())
    seen = observe(plan, coins, randomness(), CPU, others=5)
    assert seen.shape == (2, 60)
    assert np.abs(seen - coins).max() < 1e-4


def test_a_persons_canary_is_cut_by_the_micro_batches():
    units = canary_units(np.array([True, False, True]), 12, 1)
    assert [len(set(unit)) for unit in units] == [1, 1, 1]
    assert [len(unit) for unit in units] == [12, 12, 1]


def test_direct_numbers_are_those_of_noise_that_is_made_up():
    generator, coins = np.random.default_rng(4), np.arange(400) < 200
    noise = 2.0 * generator.standard_normal((200, 400))
    inside = (generator.random((200, 400)) < 0.3) & coins
    found = direct_numbers(noise + inside, coins, 0.3, 2.0)
    assert [one.right for one in found] == [1.0, 0.0, 1.0]
    assert not any(one.is_above() or one.is_below() for one in found)
    assert [abs(one.value - one.right) < 2 * one.half for one in found] == [True] * 3
    with pytest.raises(InputError, match="all coins fell alike"):
        direct_numbers(noise, np.ones(400, dtype=bool), 0.3, 2.0)


# ---------------------------------------------------------------------------- its record
def finding(**changes: object) -> Audit:
    right, none = Measured(1.0, 0.01, 1.0), Measured(0.0, 0.01, 0.0)
    values: dict = {
        "canaries": M, "delta": 1e-5, "claimed": 3.0, "bound": Bound(1.0, "jump 1", 100, 90), "ceiling": 4.5,
        "noise": right, "lag": none, "jump": right, "divisor": right, "worlds_bound": 0.0, "worlds_claimed": 1.0,
    }  # fmt: skip
    return Audit(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "not refuted: epsilon is at least 1 of the claimed 3 (perfect guesses would give 4.5)"),
        ({"bound": Bound(3.5)}, "refuted: epsilon is at least 3.5, claimed 3"),
        ({"noise": Measured(0.9, 0.01, 1.0)}, "refuted: noise is 0.900"),
        ({"noise": Measured(1.1, 0.01, 1.0)}, "not refuted: "),
        ({"lag": Measured(-0.5, 0.01, 0.0)}, "refuted: noise of successive steps is correlated"),
        ({"jump": Measured(2.0, 0.1, 1.0)}, "refuted: rate times jump is 2.000"),
        ({"jump": Measured(0.5, 0.1, 1.0)}, "blind: "),
        ({"worlds_bound": 2.0}, "refuted: the divisor tells who took part"),
        ({"claimed": 10.0}, "cannot refute epsilon 10: even perfect guesses bound it by 4.5 alone"),
        ({"claimed": 10.0, "noise": Measured(0.9, 0.01, 1.0)}, "refuted: noise"),
    ],
)
def test_the_verdict_names_what_is_refuted_and_what_could_not_have_been(changes, words):
    audit = finding(**changes)
    assert audit.verdict.startswith(words)
    assert "\n" not in audit.verdict
    assert audit.refuted == words.startswith("refuted")
    assert audit.as_json()["verdict"] == audit.verdict


def test_a_plan_without_privacy_claims_nothing_that_could_be_audited():
    with pytest.raises(InputError, match="eps=inf"):
        audit_step(no_privacy(), M, CPU)


def test_records_are_appended_and_found_by_code_and_settings_alone(tmp_path):
    path, plan = tmp_path / "audits" / "mnist5k.jsonl", plan_of()
    other = dataclasses.replace(plan, k=2)
    assert audits_of(path, plan, "code") == []
    record_audit(path, finding().as_json(), plan, "code", "2025-01-01")
    record_audit(path, finding(bound=Bound(9.0)).as_json(), other, "code", "2025-01-02")
    record_audit(path, finding().as_json(), plan, "other code", "2025-01-03")
    automatic = dataclasses.replace(plan, clipping="automatic")
    record_audit(path, finding().as_json(), automatic, "code", "2025-01-03")
    at_another_epsilon = dataclasses.replace(plan, target_epsilon=1.0, noise_multiplier=4.0)
    record_audit(path, finding(bound=Bound(9.0)).as_json(), at_another_epsilon, "code", "2025-01-04")
    with path.open("a") as file:
        file.write('{"torn')
    found = audits_of(path, plan, "code")
    # an audit that refuted the claim stays on record, whatever came before or after
    assert [(one["date"], one["refuted"]) for one in found] == [("2025-01-01", False), ("2025-01-04", True)]
    assert [one["date"] for one in audits_of(path, automatic, "code")] == ["2025-01-03"]
    assert path.stat().st_mode & 0o077 == 0
    path.write_bytes(b"\xff")
    with pytest.raises(InputError, match="cannot be read"):
        audits_of(path, plan, "code")
