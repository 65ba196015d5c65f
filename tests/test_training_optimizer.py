"""Adam that knows the noise subtracts from its second moment what the noise adds to it, and no more."""

import pytest
import torch

from dp_lora.privacy.ledger import Ledger
from dp_lora.privacy.randomness import Randomness
from dp_lora.privacy.step import mean_gradient, noisy_sum
from dp_lora.training.optimizer import NoiseDebiasedAdamW, debiased, noise_variance
from tests.support.tiny import linear_loss, no_privacy, plan_of

BETA, SPREAD, SIGNAL, COORDINATES = 0.99, 0.2, 0.1, 40_000
RANDOMNESS = Randomness("optimizer", b"0123456789abcdef")


def squares_after(steps: int, signal: float = SIGNAL, beta: float = BETA) -> torch.Tensor:
    """Adam's second moment of `signal` with noise, started at zero, in many coordinates."""
    generator = torch.Generator().manual_seed(steps)
    squares = torch.zeros(COORDINATES)
    for _ in range(steps):
        gradient = signal + SPREAD * torch.randn(COORDINATES, generator=generator)
        squares.mul_(beta).addcmul_(gradient, gradient, value=1 - beta)
    return squares


def is_unbiased(second_moment, steps: int) -> bool:
    """Whether the mean over coordinates is the signal's square, within five standard errors of that mean."""
    found = second_moment(squares_after(steps), BETA, steps, SPREAD**2)
    return abs(float(found.mean()) - SIGNAL**2) < 5 * float(found.std()) / COORDINATES**0.5


@pytest.mark.parametrize("steps", [1, 3, 40])
def test_what_is_left_of_the_second_moment_is_the_square_of_the_gradient_without_noise(steps):
    assert is_unbiased(lambda *known: debiased(*known, floor=-100.0), steps)


@pytest.mark.parametrize(
    "mutant",
    [
        lambda squares, beta, step, _variance: squares / (1 - beta**step),
        lambda squares, beta, step, variance: (squares - variance) / (1 - beta**step),
        lambda squares, _beta, _step, variance: squares - variance,
        lambda squares, beta, step, variance: squares / (1 - beta**step) - variance**0.5,
    ],
    ids=["nothing is taken off", "before the bias is corrected", "no bias is corrected", "the standard deviation"],
)
def test_mutants_of_the_debiased_moment_are_biased(mutant):
    assert not all(is_unbiased(mutant, steps) for steps in (1, 3, 40))


def test_on_noise_alone_the_second_moment_is_the_floor():
    squares = squares_after(600, signal=0.0, beta=0.995)
    floored = debiased(squares, 0.995, 600, SPREAD**2, 1.0)
    assert torch.equal(floored, torch.full_like(floored, SPREAD**2))
    half = debiased(squares, 0.995, 600, SPREAD**2, 0.5)
    assert float(half.min()) == pytest.approx(0.5 * SPREAD**2)
    assert float((half == half.min()).double().mean()) > 0.99


def moved(make, steps: int = 300) -> float:
    """Mean step, in units of the learning rate, under noise twice as large as the gradient."""
    generator = torch.Generator().manual_seed(0)
    parameter = torch.zeros(COORDINATES // 10, requires_grad=True)
    optimizer = make([{"params": [parameter], "lr": 0.01}], betas=(0.9, 0.999))
    for _ in range(steps):
        parameter.grad = SIGNAL + SPREAD * torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return -float(parameter.detach().mean()) / (0.01 * steps)


def test_noise_does_not_shorten_the_steps_that_it_shortens_in_adam():
    assert moved(torch.optim.AdamW) == pytest.approx(SIGNAL / (SIGNAL**2 + SPREAD**2) ** 0.5, rel=0.05)
    knowing = moved(lambda groups, **rest: NoiseDebiasedAdamW(groups, SPREAD**2, 0.05, **rest))
    assert knowing == pytest.approx(1.0, rel=0.2)


def test_without_noise_it_is_adamw_with_each_group_s_own_rate():
    start = torch.randn(30, generator=torch.Generator().manual_seed(1))
    found = []
    for make in (torch.optim.AdamW, lambda groups, **rest: NoiseDebiasedAdamW(groups, 0.0, 0.5, **rest)):
        parameters = [start.clone().requires_grad_() for _ in range(2)]
        optimizer = make(
            [{"params": [p], "lr": lr} for p, lr in zip(parameters, (0.05, 0.3), strict=True)], weight_decay=0.1
        )
        for step in range(7):
            for parameter in parameters:
                parameter.grad = torch.randn(30, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        found.append(parameters)
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_variance_that_is_taken_off_is_that_of_the_step_s_own_noise(tmp_path):
    plan = plan_of(noise_multiplier=3.0, max_grad_norm=0.1, expected_batch=4.0, sample_rate=1e-9)
    loss, parameters = linear_loss(torch.ones(2, 20_000)), {"w": torch.zeros(20_000)}
    total, _ = noisy_sum(plan, 0, [[0], [1]], loss, parameters, RANDOMNESS, Ledger(tmp_path / "ledger.jsonl"), 8)
    variance = float(mean_gradient(total, plan)["w"].double().var())
    assert noise_variance(plan) == pytest.approx(variance, rel=0.05)
    assert (plan.noise_multiplier * plan.max_grad_norm) ** 2 != pytest.approx(variance, rel=0.05)
    assert noise_variance(no_privacy()) == 0.0
