"""Epsilon agrees with dp-accounting, is never too small, and calibration never overshoots."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from scipy.special import log_ndtr, ndtr

from dp_lora.config import ROOT, rules
from dp_lora.errors import InputError
from dp_lora.privacy import accounting
from dp_lora.privacy.accounting import (
    LOWEST_DELTA,
    calibrate,
    cross_checked,
    epsilon_of_delta,
    noise_multiplier_for,
    pld_epsilon,
    prv_bounds,
    prv_grid_points,
    rdp_epsilon,
    spent,
    steps_for,
)
from dp_lora.privacy.loss_distribution import Pair, _one_step
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.release import privacy_statement
from tests.support.epsilon_reference import (
    calibrate_first,
    dp_accounting_pld,
    gaussian_epsilon,
    one_step_epsilon,
    optimistic_pld,
    sampled_delta,
)
from tests.support.tiny import no_privacy, plan_of, tiny_config

SETTINGS = [(0.1, 0.84, 100), (0.1, 4.0, 100), (1 / 14, 1.0, 140), (0.5, 3.0, 10), (1.0, 5.0, 20)]
PUBLIC = {
    "delta": 1e-5,
    "n_public": 4000,
    "batch_size": 400,
    "epochs": 10,
    "max_grad_norm": 0.05,
    "k": 1,
    "unit": "picture",
}


@pytest.mark.parametrize(("q", "sigma", "steps"), SETTINGS)
def test_epsilon_agrees_with_dp_accounting_and_is_never_below_its_optimistic_bound(q, sigma, steps):
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=1e-3)
    event = dp_accounting.GaussianDpEvent(sigma)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(q, event) if q < 1 else event, steps)
    found = pld_epsilon(q, sigma, steps, 1e-5)
    assert found == pytest.approx(accountant.get_epsilon(1e-5), rel=2e-3)
    assert found >= optimistic_pld(q, sigma, steps, 1e-5, 1e-3)
    assert found <= rdp_epsilon(q, sigma, steps, 1e-5) * 1.01


@pytest.mark.parametrize("delta", [1e-10, 1e-5, 1e-2])
@pytest.mark.parametrize("shift", [0.03, 1.0, 8.0])
def test_at_rate_one_epsilon_is_that_of_one_gaussian_and_a_little_above(shift, delta):
    """Steps with noise sigma are one step with sigma / sqrt(steps), whose exact epsilon is known."""
    exact = gaussian_epsilon(shift, delta)
    for steps in (1, 1000, 10**6):
        found = pld_epsilon(1.0, math.sqrt(steps) / shift, steps, delta)
        assert exact <= found <= 1.002 * exact


@pytest.mark.parametrize(("q", "sigma", "delta"), [(1e-3, 1.0, 3e-4), (1e-4, 2.0, 1.8e-5), (1e-2, 1.0, 1e-5)])
def test_one_step_at_a_small_rate_and_a_delta_that_nearly_covers_it_is_just_above_the_exact_epsilon(q, sigma, delta):
    exact = one_step_epsilon(q, sigma, delta)
    assert exact <= pld_epsilon(q, sigma, 1, delta) <= 1.002 * exact


@pytest.mark.parametrize("removed", [True, False])
def test_one_step_s_delta_is_never_too_small_where_the_loss_is_too_large_for_float64_s_exp(removed):
    step = _one_step(Pair(1.0, 1 / 40, removed, 1e-12), cell=1.0, lowest=0.0)
    for eps in range(600, 1000, 7):
        beyond = -np.expm1(np.minimum(eps - step.values, 0.0)) @ step.probabilities + step.infinite
        exact = ndtr(20 - eps / 40) - math.exp(eps + log_ndtr(-20 - eps / 40))
        assert beyond >= exact - 1e-14


def test_an_fft_without_the_tilt_prints_less_than_the_exact_epsilon():
    """dp-accounting prints too little at 10^6 steps and delta 1e-10, even on a finer grid than ours; it has no tilt."""
    sigma, exact = 1e3 / 0.1, gaussian_epsilon(0.1, 1e-10)
    assert dp_accounting_pld(1.0, sigma, 10**6, 1e-10, 5e-6) < 0.999 * exact
    assert pld_epsilon(1.0, sigma, 10**6, 1e-10) >= exact


def never_too_small(q: float, sigma: float, steps: int, delta: float, epsilon: float, samples: int) -> bool:
    """Whether `epsilon` is at or above every independent lower bound."""
    if q == 1 and epsilon < gaussian_epsilon(math.sqrt(steps) / sigma, delta):
        return False
    for removed in (True, False):
        mean, error = sampled_delta(q, sigma, steps, epsilon, delta, removed=removed, samples=samples)
        if mean - 4 * error > delta:
            return False
    return True


def check_plans(found: list[dict], samples: int) -> None:
    for plan in found:
        assert plan["seconds"] < 20, plan
        assert 0.995 * plan["eps"] <= plan["epsilon"] <= plan["eps"], plan
        assert never_too_small(*plan["public"], plan["epsilon"], samples), plan


def test_the_hardest_plans_calibrate_at_once_to_their_target_and_never_too_little():
    check_plans(calibrate_first(10), 200)


@pytest.mark.slow
def test_every_plan_calibrates_at_once_in_little_memory_to_its_target_and_never_too_little():
    """Eps 0.01 to 100, rates 1e-6 to 1, 1 to 10^6 steps, delta 1e-10 to 1e-2, in a process of its own on one core."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.epsilon_reference", "60"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    found, memory = json.loads(done.stdout)
    assert len(found) == 60
    assert memory < 2**30
    check_plans(found, 4000)
    few = [plan for plan in found if plan["public"][2] <= 1000]
    assert len(few) > 20
    for plan in few:
        interval = max(0.02 * plan["eps"] / plan["public"][2], 5e-5 * plan["eps"])
        assert plan["epsilon"] >= optimistic_pld(*plan["public"], interval), plan


def test_a_mutant_that_prints_a_little_less_is_seen_by_the_independent_bounds():
    for q, sigma, steps, delta in ((0.01, 2.0, 10**6, 1e-9), (1.0, 1000.0, 10**5, 1e-6), (0.1, 1.0, 100, 1e-5)):
        epsilon = pld_epsilon(q, sigma, steps, delta)
        assert never_too_small(q, sigma, steps, delta, epsilon, 2000)
        assert not never_too_small(q, sigma, steps, delta, 0.97 * epsilon, 4000)


@pytest.mark.parametrize(
    ("eps", "delta", "q", "steps", "interval"),
    [(0.05, 1e-5, 0.001, 10**5, 1e-6), (0.1404, 1e-5, 0.014, 63_402, 3e-6), (1.0, 1e-5, 1 / 30, 6000, 1e-4)],
)
def test_no_more_noise_than_a_twentieth_above_what_the_tightest_accountant_needs(eps, delta, q, steps, interval):
    sigma = noise_multiplier_for(eps, delta, q, steps) / 1.05
    bounds = [rdp_epsilon(q, sigma, steps, delta), dp_accounting_pld(q, sigma, steps, delta, interval)]
    if (prv := prv_bounds(q, sigma, steps, delta, eps / 20)) is not None:
        bounds.append(prv[1])
    assert min(bounds) > eps


def test_epsilon_grows_with_steps_and_sample_rate_and_shrinks_with_noise():
    def eps(q, sigma, steps):
        return pld_epsilon(q, sigma, steps, 1e-5)

    assert eps(0.1, 1.0, 10) < eps(0.1, 1.0, 20) < eps(0.1, 1.0, 40)
    assert eps(0.05, 1.0, 20) < eps(0.1, 1.0, 20) < eps(0.3, 1.0, 20)
    assert eps(0.1, 2.0, 20) < eps(0.1, 1.0, 20)
    assert pld_epsilon(0.1, 1.0, 0, 1e-5) == 0


@pytest.mark.parametrize("eps", [1.0, 10.0])
def test_calibrate_then_account_gives_at_most_the_target_and_nearly_all_of_it(eps):
    plan = calibrate(eps=eps, **PUBLIC)
    assert 0.995 * eps < spent(plan, plan.steps).epsilon <= eps
    assert (plan.sample_rate, plan.steps, plan.expected_batch) == (0.1, 100, 400.0)


def test_a_mutant_that_accounts_another_sample_rate_prints_too_little():
    plan = calibrate(eps=5.0, **PUBLIC)
    true_rate = pld_epsilon(3 * plan.sample_rate, plan.noise_multiplier, plan.steps, plan.delta)
    assert true_rate > 2 * spent(plan, plan.steps).epsilon


def test_the_published_draws_clipped_apart_are_far_above_their_claim():
    """k = 2, q = 1/14, 140 steps: the noise fits C, but the sensitivity is k * C; a claimed epsilon of 1 is 2.4."""
    claimed = accounting.noise_multiplier_for(1.0, 1e-5, 1 / 14, 140)
    assert pld_epsilon(1 / 14, claimed / 2, 140, 1e-5) == pytest.approx(2.4, abs=0.1)


def test_a_grid_that_would_not_fit_is_predicted_and_prv_left_out():
    assert prv_grid_points(1 / 30, 0.1, 6000, 1e-5) > accounting.PRV_GRID_LIMIT
    assert prv_bounds(1 / 30, 0.1, 6000, 1e-5) is None
    found = cross_checked(plan_of(sample_rate=1 / 30, noise_multiplier=0.1, steps=6000, delta=1e-5), 6000)
    assert (found.prv_lower, found.prv) == (None, None)


def test_prv_is_left_out_where_its_own_rounding_passes_its_delta():
    assert prv_grid_points(0.1, 10.0, 10**4, 1e-10, 0.1) < accounting.PRV_GRID_LIMIT
    assert prv_bounds(0.1, 10.0, 10**4, 1e-10, 0.1) is None
    assert prv_bounds(0.1, 10.0, 10**4, 1e-5, 0.1) is not None


def test_what_is_printed_lies_between_the_bounds_of_prv():
    plan = calibrate(eps=5.0, **PUBLIC)
    found = cross_checked(plan, plan.steps)
    assert found.epsilon == spent(plan, plan.steps).epsilon
    assert 4.8 < found.prv_lower < found.epsilon < found.prv < found.rdp


def test_a_wrong_pld_is_seen_by_prv_so_that_no_plan_is_made_and_nothing_is_released(monkeypatch):
    plan = calibrate(eps=5.0, **PUBLIC)
    right, config = pld_epsilon, tiny_config()
    assert privacy_statement(plan, 90, "id", "head", config)["private"]
    monkeypatch.setattr(accounting, "pld_epsilon", lambda *public: 0.9 * right(*public))
    monkeypatch.setattr(accounting, "noise_multiplier_for", noise_multiplier_for.__wrapped__)
    for refused in (lambda: calibrate(eps=5.0, **PUBLIC), lambda: privacy_statement(plan, 90, "id", "head", config)):
        with pytest.raises(InputError, match=r"below the lower bound .* nothing is released") as error:
            refused()
        assert "\n" not in str(error.value)


def test_the_predicted_grid_is_the_one_that_opacus_makes():
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(1.0, 0.1, 100)]
    dprv = accountant._get_dprv(eps_error=0.01, delta_error=1e-8)
    assert prv_grid_points(0.1, 1.0, 100, 1e-5) == pytest.approx(len(dprv.pmf), rel=0.05)


def test_the_accountants_without_the_rest_of_opacus_compute_the_same_bits_and_leave_opacus_whole():
    script = """
import sys
from dp_lora.privacy.accounting import prv_bounds, rdp_epsilon
from dp_lora.privacy.opacus_accountants import accountants
public = (0.1, 1.1, 150, 1e-5)
alone = [rdp_epsilon(*public), prv_bounds(*public)]
assert not {"torch", "opacus"} & set(sys.modules)
import opacus
import opacus.accountants.utils
accountants.cache_clear()
assert accountants() == (opacus.accountants, opacus.accountants.utils)
assert hasattr(opacus, "PrivacyEngine") and "torch" in sys.modules
assert alone == [rdp_epsilon.__wrapped__(*public), prv_bounds.__wrapped__(*public)] and None not in alone
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"delta": 1 / 4000}, "below 1/n_public"),
        ({"delta": 0.0}, "below 1/n_public"),
        ({"delta": 0.5}, "below 1/n_public"),
        ({"delta": 9e-11}, "at least 1e-10"),
        ({"batch_size": 4001}, "n_public"),
        ({"eps": 0.0}, "above 0"),
        ({"eps": -1.0}, "above 0"),
        ({"eps": math.nan}, "above 0"),
        ({"eps": 1e-4}, "eps=0.0001: must be at least 0.001"),
        ({"eps": 1e12}, "no noise_multiplier gives it"),
    ],
)
def test_senseless_targets_are_refused_in_one_line(change, rule):
    with pytest.raises(InputError, match=rule) as error:
        calibrate(**{"eps": 1.0, **PUBLIC, **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("q", "sigma"), [(1.1, 1.0), (0.0, 1.0), (0.1, 0.0), (0.1, -1.0), (0.1, math.inf)])
def test_rates_above_one_and_noise_of_zero_or_less_have_no_epsilon(q, sigma):
    with pytest.raises(InputError):
        pld_epsilon(q, sigma, 1, 1e-5)


def test_a_plan_with_finite_epsilon_and_no_noise_cannot_be_made():
    for change in (
        {"noise_multiplier": 0.0},
        {"max_grad_norm": math.inf},
        {"sample_rate": 1.5},
        {"delta": 1.0},
        {"k": 0},
    ):
        with pytest.raises(InputError):
            plan_of(**change)
    with pytest.raises(InputError):
        no_privacy(relation="replace-one")


def test_a_plan_survives_its_file_and_a_changed_file_is_refused():
    for plan in (plan_of(), plan_of(clipping="automatic"), no_privacy()):
        assert PrivacyPlan.from_json(plan.as_json()) == plan
    broken = plan_of().as_json()
    of_before = {name: value for name, value in broken.items() if name not in ("accounting", "clipping")}
    assert PrivacyPlan.from_json(of_before) == plan_of()
    for change in (
        {"clipping": "none"},
        {"clipping": "automatic", "accounting": "published"},
        {"noise_multiplier": "1"},
        {"extra": 1},
        {"steps": 1.5},
        {"noise_multiplier": 0.0},
    ):
        with pytest.raises(InputError):
            PrivacyPlan.from_json({**broken, **change})


def test_steps_are_epochs_over_the_sample_rate_rounded_up():
    assert steps_for(10, 2048 / 28000) == 137
    assert steps_for(200, 1 / 30) == 6000
    assert steps_for(10, 0.1) == 100


def test_a_run_without_privacy_has_no_epsilon():
    for no_curve in (spent, epsilon_of_delta):
        with pytest.raises(InputError, match="no epsilon"):
            no_curve(no_privacy(), 3)


@pytest.mark.parametrize("accounting", ["per_unit", "published"])
def test_every_point_of_the_curve_over_delta_is_a_bound_and_the_plan_s_own_is_within_what_is_stated(accounting):
    plan = plan_of(delta=1e-5, k=2, accounting=accounting)
    curve = dict(epsilon_of_delta(plan, 7))
    assert min(curve) == 1e-10
    assert max(curve) == pytest.approx(1e-4)
    assert len(curve) >= 12
    assert list(curve.values()) == sorted(curve.values(), reverse=True)
    assert curve[1e-5] == spent(plan, 7).epsilon
    forgetful, sigma = dict(epsilon_of_delta(plan, 6)), plan.noise_multiplier / plan.sensitivity
    for delta in (min(curve), max(curve)):
        lower = optimistic_pld(plan.sample_rate, sigma, 7, delta, 1e-3)
        # a mutant that forgets a step states less than the lower bound of the mechanism's cost
        assert forgetful[delta] < lower <= curve[delta]


def test_a_plan_of_a_large_or_tiny_delta_has_a_curve_too():
    for delta in (0.5, LOWEST_DELTA):
        curve = epsilon_of_delta(plan_of(delta=delta), 3)
        assert delta in dict(curve)
        assert all(0 < point < 1 and epsilon >= 0 for point, epsilon in curve)


def test_down_to_the_lowest_delta_the_bound_is_above_the_lower_one_and_the_config_s_rule_is_the_same():
    assert rules.LOWEST_DELTA == LOWEST_DELTA
    with pytest.raises(InputError, match=r"delta=1e-11: must be in \[1e-10, 1\)"):
        pld_epsilon(0.1, 1.0, 100, 1e-11)
    for sample_rate, sigma, steps in ((0.1, 1.0, 100), (0.07, 0.6, 137), (0.03, 3.0, 6000)):
        lower = optimistic_pld(sample_rate, sigma, steps, LOWEST_DELTA, 1e-3)
        assert lower <= pld_epsilon(sample_rate, sigma, steps, LOWEST_DELTA)
