"""The released weights: their moving average, or the mean of their last steps; and the state in a checkpoint."""

from dataclasses import replace

import pytest
import torch

from dp_lora.config import load
from dp_lora.models.adapters import EMBEDDING
from dp_lora.training import averaged
from dp_lora.training.averaged import Averaged
from dp_lora.training.moving_average import tail_weight
from tests.support.tiny import plan_of

PLAN = plan_of(steps=10, noise_multiplier=2.0, expected_batch=4.0)
SETTINGS = [{}, {"noise_debias": 0.5}, {"tail_average": 0.4}, {"noise_debias": 0.1, "tail_average": 1.0}]


def made(**settings):
    parameters = {name: torch.zeros(50, requires_grad=True) for name in (EMBEDDING, "lora")}
    return Averaged(replace(load("mnist5k").train, **settings), parameters, PLAN)


def taken(state, steps):
    """Take `steps`; gives the weights after each of them."""
    seen = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        gradient = {name: 0.1 + 0.05 * torch.randn(50, generator=generator) for name in state.parameters}
        state.step(gradient, step)
        seen.append({name: parameter.detach().clone() for name, parameter in state.parameters.items()})
    return seen


def released(state):
    with state.released():
        return {name: parameter.detach().clone() for name, parameter in state.parameters.items()}


def is_the_tail_s_mean(state):
    seen = taken(state, range(10))
    return all(
        torch.allclose(value, torch.stack([one[name] for one in seen[-4:]]).mean(0), rtol=1e-5, atol=1e-7)
        for name, value in released(state).items()
    )


def test_the_tail_s_mean_is_released_and_the_parameters_go_on_from_their_own(monkeypatch):
    assert is_the_tail_s_mean(made(tail_average=0.4))
    assert not is_the_tail_s_mean(made())
    # a mutant that averages all steps, not the last share of them
    monkeypatch.setattr(averaged, "tail_weight", lambda step, total, share: tail_weight(step, total, 1.0))
    assert not is_the_tail_s_mean(made(tail_average=0.4))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("stop", [1, 3, 8])
def test_a_state_that_was_saved_and_loaded_goes_on_bit_for_bit(settings, stop):
    whole, first, second = made(**settings), made(**settings), made(**settings)
    taken(whole, range(10))
    taken(first, range(stop))
    second.load({name: tensor.detach().clone() for name, tensor in first.tensors().items()})
    taken(second, range(stop, 10))
    found, expected = second.tensors(), whole.tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(torch.equal(released(second)[name], value) for name, value in released(whole).items())


def test_the_class_embedding_keeps_its_own_rate_where_the_noise_is_taken_off():
    state = made(noise_debias=1.0, lr_schedule="constant", lr_noise_exponent=0.0)
    (seen,) = taken(state, [0])
    assert state.rates == {EMBEDDING: 0.1, "lora": 0.02}
    # in the first step both move by their own rate times the same formula
    generator = torch.Generator().manual_seed(0)
    gradients = {name: 0.1 + 0.05 * torch.randn(50, generator=generator) for name in seen}
    variance = (2.0 * 0.1 / 4.0) ** 2
    for name, gradient in gradients.items():
        expected = -state.rates[name] * gradient / (gradient.square() - variance).clamp_min(variance).sqrt()
        torch.testing.assert_close(seen[name], expected, rtol=1e-4, atol=1e-6)
