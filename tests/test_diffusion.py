from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from dp_lora.diffusion import Flow, diffuse, loss_per_row, make_scheduler, process_of, target
from dp_lora.errors import InputError

GOLDEN = np.load(Path(__file__).parent / "data" / "schedules.npz")  # from the original latent-diffusion code
SCHEDULES = {
    "linear_cin": ("linear", 0.0015, 0.0195),
    "linear_emnist": ("linear", 0.0015, 0.0155),
    "cosine": ("cosine", 0.0015, 0.0195),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_equal_those_of_latent_diffusion(name):
    scheduler = make_scheduler(*SCHEDULES[name], "epsilon")
    np.testing.assert_allclose(scheduler.betas.numpy(), GOLDEN[f"{name}_betas"], atol=3e-8)
    np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), GOLDEN[f"{name}_alphas_cumprod"], atol=1e-6)


@pytest.mark.parametrize("steps", [5, 50, 200])
def test_ddim_visits_the_timesteps_of_latent_diffusion_and_ends_at_its_first_alpha(steps):
    scheduler = make_scheduler("linear", 0.0015, 0.0195, "epsilon")
    scheduler.set_timesteps(steps)
    np.testing.assert_array_equal(scheduler.timesteps.numpy()[::-1], GOLDEN[f"ddim_timesteps_{steps}"])
    previous = GOLDEN[f"linear_cin_ddim{steps}_alphas_prev"]
    assert float(scheduler.final_alpha_cumprod) == pytest.approx(previous[0], abs=1e-7)


def test_rows_are_noised_with_the_golden_coefficients():
    a = GOLDEN["linear_cin_alphas_cumprod"]
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(3, 2, 4, 4, generator=generator), torch.randn(3, 2, 4, 4, generator=generator)
    t = torch.tensor([0, 400, 999])
    found = diffuse(x0, noise, torch.from_numpy(a), t)
    for row, step in enumerate(t.tolist()):
        expected = np.sqrt(a[step]) * x0[row].numpy() + np.sqrt(1 - a[step]) * noise[row].numpy()
        np.testing.assert_allclose(found[row].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_perfect_prediction_leads_ddim_back_to_the_clean_row(prediction_type):
    scheduler = make_scheduler("cosine", 0.0015, 0.0195, prediction_type)
    scheduler.set_timesteps(10)
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(1, 2, 4, 4, generator=generator), torch.randn(1, 2, 4, 4, generator=generator)
    for step in (1, 401, 901):
        t = torch.tensor([step])
        noisy = diffuse(x0, noise, scheduler.alphas_cumprod, t)
        prediction = target(x0, noise, scheduler.alphas_cumprod, t, prediction_type)
        found = scheduler.step(prediction, step, noisy).pred_original_sample
        torch.testing.assert_close(found, x0, atol=2e-5, rtol=0)


def test_leading_dimensions_of_units_and_draws_stay_apart():
    alphas_cumprod = make_scheduler("linear", 0.0015, 0.0195, "epsilon").alphas_cumprod
    generator = torch.Generator().manual_seed(2)
    x0, noise = torch.randn(3, 2, 1, 4, 4, generator=generator), torch.randn(3, 2, 1, 4, 4, generator=generator)
    t = torch.tensor([[1, 2], [300, 400], [998, 999]])
    noisy = diffuse(x0, noise, alphas_cumprod, t)
    flat = diffuse(x0.flatten(0, 1), noise.flatten(0, 1), alphas_cumprod, t.flatten())
    torch.testing.assert_close(noisy.flatten(0, 1), flat, atol=0, rtol=0)
    losses = loss_per_row(noisy, x0)
    assert losses.shape == (3, 2)
    assert losses[2, 1].item() == pytest.approx((noisy[2, 1] - x0[2, 1]).square().mean().item(), rel=1e-6)


def test_unknown_names_are_refused_by_key():
    with pytest.raises(InputError, match=r"ldm\.beta_schedule=sigmoid"):
        make_scheduler("sigmoid", 0.0015, 0.0195, "epsilon")
    with pytest.raises(InputError, match=r"ldm\.prediction_type=sample"):
        make_scheduler("linear", 0.0015, 0.0195, "sample")


def test_the_process_of_a_flow_is_read_off_its_scheduler_whichever_solver_it_is():
    for scheduler, shift in (
        (FlowMatchEulerDiscreteScheduler(shift=3.0), 3.0),
        (FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), 1.0),
        (DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0), 2.0),
    ):
        assert process_of(scheduler, "base") == Flow(shift)


def test_the_process_of_noise_has_the_betas_of_its_scheduler_whichever_solver_it_is():
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    expected = DDPMScheduler(**betas).alphas_cumprod
    for kind in (PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler):
        found = process_of(kind(prediction_type="v_prediction", **betas), "base")
        assert found.prediction_type == "v_prediction"
        torch.testing.assert_close(found.alphas_cumprod, expected)
