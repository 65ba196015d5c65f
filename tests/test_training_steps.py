import numpy as np
import pytest
import torch

from dp_lora.learning_rate import lr_factor, noise_scale
from dp_lora.training.moving_average import tail_weight
from dp_lora.training.seeds import seeded
from dp_lora.training.steps import (
    EpochOrder,
    Steps,
    step_generator,
    total_steps,
)


def test_steps_cover_the_epochs_rounded_up():
    assert total_steps(1.44, 20_000, 64) == 450
    assert total_steps(6.4, 20_000, 64) == 2000
    assert total_steps(1, 10, 4) == 3
    assert total_steps(0.01, 10, 4) == 1


def test_every_row_comes_once_per_epoch_and_epochs_differ():
    order = EpochOrder(10, 4, seed=3)
    stream = np.concatenate([order.rows(step) for step in range(5)])
    first, second = stream[:10], stream[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first.tolist() != second.tolist()


def test_a_batch_larger_than_the_data_goes_through_several_epochs():
    rows = EpochOrder(3, 7, seed=0).rows(2)
    assert len(rows) == 7
    assert np.bincount(rows, minlength=3).min() >= 2


def test_rows_depend_on_seed_and_step_alone():
    order = EpochOrder(10, 4, seed=3)
    for step in range(4):
        order.rows(step)
    assert order.rows(4).tolist() == EpochOrder(10, 4, seed=3).rows(4).tolist()
    assert order.rows(4).tolist() != EpochOrder(10, 4, seed=4).rows(4).tolist()


def test_noise_of_a_step_is_its_own_by_seed_step_and_stage():
    def draw(*key):
        return torch.randn(4, generator=step_generator(*key)).tolist()

    assert draw(1, 2, "ldm") == draw(1, 2, "ldm")
    draws = [draw(1, 2, "ldm"), draw(2, 2, "ldm"), draw(1, 3, "ldm"), draw(12, 1, "ldm"), draw(1, 2, "autoencoder")]
    assert len({tuple(values) for values in draws}) == 5


def test_the_learning_rate_warms_up_and_follows_half_a_cosine():
    assert [lr_factor("constant", step, 10) for step in (0, 9)] == [1, 1]
    assert lr_factor("cosine", 0, 10) == 1
    assert lr_factor("cosine", 5, 10) == pytest.approx(0.5)
    assert 0 < lr_factor("cosine", 9, 10) < 0.03
    assert lr_factor("cosine", 10, 10, final=0.05) == pytest.approx(0.05)
    assert [lr_factor("constant", step, 10, warmup_steps=3) for step in range(4)] == [0.25, 0.5, 0.75, 1]


def test_a_loader_goes_on_after_the_last_number_that_it_gave():
    steps = Steps(5)
    numbers = iter(steps)
    assert [next(numbers), next(numbers)] == [0, 1]
    resumed = Steps(5)
    resumed.load_state_dict(steps.state_dict())
    assert list(resumed) == [2, 3, 4]


def test_a_seeded_start_leaves_the_global_generator_as_it_was():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with seeded(5, "ldm"):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with seeded(5, "ldm"):
        assert torch.equal(torch.rand(3), first)
    with seeded(5, "autoencoder"):
        assert not torch.equal(torch.rand(3), first)


def test_the_learning_rate_falls_with_the_noise_multiplier_and_never_rises():
    assert noise_scale(0.0, 0.67) == noise_scale(1.0, 0.67) == noise_scale(8.0, 0.0) == 1.0
    assert noise_scale(8.0, 1 / 3) == pytest.approx(0.5)


@pytest.mark.parametrize(("total", "share", "kept"), [(10, 0.4, 4), (10, 1.0, 10), (7, 0.01, 1), (150, 0.25, 38)])
def test_the_tail_s_mean_is_that_of_the_last_share_of_the_steps(total, share, kept):
    values = np.random.default_rng(0).standard_normal(total)
    mean = 123.0  # the start belongs to no step
    for step in range(total):
        mean += tail_weight(step, total, share) * (values[step] - mean)
        if step < total - kept:
            assert mean == pytest.approx(values[step])  # a run that stops early releases its newest weights
    assert mean == pytest.approx(values[-kept:].mean())
