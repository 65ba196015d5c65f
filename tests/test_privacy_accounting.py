"""Check 9: epsilon agrees with dp-accounting, is never too small, and calibration never overshoots."""

import math

import pytest
from tiny import no_privacy, plan_of

from dp_lora.config import rules
from dp_lora.errors import InputError
from dp_lora.privacy import accounting
from dp_lora.privacy.accounting import (
    LOWEST_DELTA,
    bounds,
    calibrate,
    epsilon_of_delta,
    pld_epsilon,
    prv_grid_points,
    spent,
    steps_for,
)
from dp_lora.privacy.plan import PrivacyPlan

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
    reference = accountant.get_epsilon(1e-5)
    found = bounds(q, sigma, steps, 1e-5)
    assert found.pld == pytest.approx(reference, rel=2e-3)
    assert found.epsilon >= pld_epsilon(q, sigma, steps, 1e-5, pessimistic=False)
    assert found.epsilon == max(found.pld, found.prv or 0)
    assert found.epsilon <= found.rdp * 1.01


def test_epsilon_grows_with_steps_and_sample_rate_and_shrinks_with_noise():
    def eps(q, sigma, steps):
        return bounds(q, sigma, steps, 1e-5).epsilon

    assert eps(0.1, 1.0, 10) < eps(0.1, 1.0, 20) < eps(0.1, 1.0, 40)
    assert eps(0.05, 1.0, 20) < eps(0.1, 1.0, 20) < eps(0.3, 1.0, 20)
    assert eps(0.1, 2.0, 20) < eps(0.1, 1.0, 20)
    assert bounds(0.1, 1.0, 0, 1e-5).epsilon == 0


@pytest.mark.parametrize("eps", [1.0, 10.0])
def test_calibrate_then_account_gives_at_most_the_target_and_nearly_all_of_it(eps):
    plan = calibrate(eps=eps, **PUBLIC)
    assert 0.97 * eps < spent(plan, plan.steps).epsilon <= eps
    assert (plan.sample_rate, plan.steps, plan.expected_batch) == (0.1, 100, 400.0)


def test_a_mutant_that_accounts_another_sample_rate_prints_too_little():
    plan = calibrate(eps=5.0, **PUBLIC)
    true_rate = bounds(3 * plan.sample_rate, plan.noise_multiplier, plan.steps, plan.delta)
    assert true_rate.epsilon > 2 * spent(plan, plan.steps).epsilon


def test_the_published_draws_clipped_apart_are_far_above_their_claim():
    """k = 2, q = 1/14, 140 steps: noise is set for C where k * C is true; a claim of 1 is 2.4."""
    claimed = accounting.noise_multiplier_for(1.0, 1e-5, 1 / 14, 140)
    assert pld_epsilon(1 / 14, claimed / 2, 140, 1e-5) == pytest.approx(2.4, abs=0.1)


def test_a_grid_that_would_not_fit_is_predicted_and_prv_left_out():
    assert prv_grid_points(1 / 30, 0.1, 6000, 1e-5) > accounting.PRV_GRID_LIMIT
    found = bounds(1 / 30, 0.25, 6000, 1e-5)
    assert found.prv is None
    assert found.epsilon == found.pld


def test_the_predicted_grid_is_the_one_that_opacus_makes():
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(1.0, 0.1, 100)]
    dprv = accountant._get_dprv(eps_error=0.01, delta_error=1e-8)
    assert prv_grid_points(0.1, 1.0, 100, 1e-5) == pytest.approx(len(dprv.pmf), rel=0.05)


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
        ({"eps": 1e-4}, "eps=0.0001"),
    ],
)
def test_senseless_targets_are_refused_in_one_line(change, rule):
    with pytest.raises(InputError, match=rule) as error:
        calibrate(**{"eps": 1.0, **PUBLIC, **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("q", "sigma"), [(1.1, 1.0), (0.0, 1.0), (0.1, 0.0), (0.1, -1.0), (0.1, math.inf)])
def test_rates_above_one_and_noise_of_zero_or_less_have_no_epsilon(q, sigma):
    with pytest.raises(InputError):
        bounds(q, sigma, 1, 1e-5)


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
    for plan in (plan_of(), no_privacy()):
        assert PrivacyPlan.from_json(plan.as_json()) == plan
    broken = plan_of().as_json()
    for change in ({"noise_multiplier": "1"}, {"extra": 1}, {"steps": 1.5}, {"noise_multiplier": 0.0}):
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
    assert curve[1e-5] <= spent(plan, 7).epsilon
    forgetful, sigma = dict(epsilon_of_delta(plan, 6)), plan.noise_multiplier / plan.sensitivity
    for delta in (min(curve), max(curve)):
        lower = pld_epsilon(plan.sample_rate, sigma, 7, delta, pessimistic=False)
        # a mutant that forgets a step is below what the mechanism spends at least
        assert forgetful[delta] < lower <= curve[delta]


def test_a_plan_of_a_large_or_tiny_delta_has_a_curve_too():
    for delta in (0.5, LOWEST_DELTA):
        curve = epsilon_of_delta(plan_of(delta=delta), 3)
        assert delta in dict(curve)
        assert all(0 < point < 1 and epsilon >= 0 for point, epsilon in curve)


def test_down_to_the_lowest_delta_the_bound_is_above_the_lower_one_and_the_config_s_rule_is_the_same():
    assert rules.LOWEST_DELTA == LOWEST_DELTA
    with pytest.raises(InputError, match=r"delta=1e-11: must be in \[1e-10, 1\)"):
        bounds(0.1, 1.0, 100, 1e-11)
    for sample_rate, sigma, steps in ((0.1, 1.0, 100), (0.07, 0.6, 137), (0.03, 3.0, 6000)):
        lower = pld_epsilon(sample_rate, sigma, steps, LOWEST_DELTA, pessimistic=False)
        assert lower <= bounds(sample_rate, sigma, steps, LOWEST_DELTA).pld
