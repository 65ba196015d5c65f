"""Checks 3 to 7: the noise follows its law, comes once per step and reaches the sum; Poisson draws; empty draws."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from dp_lora.errors import InputError
from dp_lora.privacy.clipping import STABILITY
from dp_lora.privacy.ledger import Ledger
from dp_lora.privacy.noise import add_noise
from dp_lora.privacy.plan import AUTOMATIC, FLAT
from dp_lora.privacy.randomness import ItemStreams, Randomness
from dp_lora.privacy.sampling import poisson_draw
from dp_lora.privacy.step import noisy_sum
from tests.support.tiny import difference, linear_loss, no_privacy, plan_of, total_norm

CPU = torch.device("cpu")
SHAPES = {"a": (40, 25), "b": (1000,)}
SECRET = b"0123456789abcdef0123456789abcdef"


def replayed(digest: str = "run") -> Randomness:
    return Randomness(digest, SECRET)


def one_step(tmp_path: Path, plan, directions, units, randomness=None, step=0, physical=1000):
    tmp_path.mkdir(exist_ok=True)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    parameters = {"w": torch.zeros(directions.shape[1])}
    return noisy_sum(plan, step, units, linear_loss(directions), parameters, randomness or replayed(), ledger, physical)


def noise_of(sigma: float, step: int) -> dict[str, torch.Tensor]:
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    return add_noise(zeros, sigma, replayed().numpy("noise", step))


def test_noise_has_the_law_sigma_times_max_grad_norm():
    std = 1.7 * 0.3
    for name, values in noise_of(std, 0).items():
        flat = values.flatten().numpy()
        assert stats.kstest(flat, "norm", args=(0, std)).pvalue > 1e-3, name
        assert stats.kstest(flat, "norm", args=(0, std * 2 / 3)).pvalue < 1e-6, name
        assert stats.kstest(flat, "norm", args=(0, std * 3 / 2)).pvalue < 1e-6, name


def test_noise_of_tensors_and_steps_is_uncorrelated():
    first, second = noise_of(1.0, 0), noise_of(1.0, 1)
    columns = [first["a"].flatten(), first["b"], second["a"].flatten(), second["b"]]
    correlation = np.corrcoef(torch.stack(columns).numpy())
    assert np.abs(correlation - np.eye(4)).max() < 0.15


def test_two_runs_with_one_secret_share_no_noise():
    a = replayed("run one").numpy("noise", 3).standard_normal(2000)
    b = replayed("run two").numpy("noise", 3).standard_normal(2000)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.1


def test_fresh_randomness_never_repeats():
    fresh = Randomness("run")
    assert not np.array_equal(fresh.numpy("noise", 0).standard_normal(8), fresh.numpy("noise", 0).standard_normal(8))


def test_seeds_of_the_private_draws_keep_more_than_32_bits():
    """Torch's CPU generator keeps only 32 bits of its seed, so the private draws must not use it."""
    low = torch.randn(4, generator=torch.Generator().manual_seed(1))
    high = torch.randn(4, generator=torch.Generator().manual_seed(1 + 2**32))
    assert torch.equal(low, high)
    assert len({ItemStreams(seed)[0].random() for seed in (1, 1 + 2**32, 1 + 2**200)}) == 3


def test_the_seed_s_pool_keeps_256_bits_where_numpy_s_default_would_keep_128():
    """A mutant without POOL_SIZE gives each generator the draws of numpy's default pool."""
    entropy = 3 * 2**200 + 5
    default = np.random.Generator(np.random.SFC64(np.random.SeedSequence(entropy, spawn_key=(0,)))).random()
    wide = np.random.Generator(np.random.SFC64(np.random.SeedSequence(entropy, spawn_key=(0,), pool_size=8))).random()
    assert ItemStreams(entropy)[0].random() == wide != default
    kept = Randomness("run", SECRET)
    pool = np.random.SeedSequence(int.from_bytes(kept._bits("noise", 0)), pool_size=8)
    assert kept.numpy("noise", 0).random() == np.random.Generator(np.random.SFC64(pool)).random()


@pytest.mark.parametrize("physical", [1, 3, 1000])
def test_noise_comes_once_per_step_however_the_batch_is_cut(tmp_path, physical):
    directions = torch.randn(12, 500, generator=torch.Generator().manual_seed(1))
    units = [[i] for i in range(12)]
    plan = plan_of(sample_rate=0.9, max_grad_norm=0.5, noise_multiplier=2.0)
    noisy, facts = one_step(tmp_path, plan, directions, units, physical=physical)
    silent, _ = one_step(
        tmp_path / "other", no_privacy(sample_rate=0.9), directions / directions.norm(dim=1)[:, None] / 2, units
    )
    noise = (noisy["w"] - silent["w"]).numpy()
    assert facts.units > 3
    assert stats.kstest(noise, "norm", args=(0, 1.0)).pvalue > 1e-3


def test_sigma_1000_moves_the_sum_by_the_closed_form_norm(tmp_path):
    directions = torch.zeros(4, 4000)
    noisy, _ = one_step(
        tmp_path, plan_of(noise_multiplier=1000.0, max_grad_norm=0.5), directions, [[i] for i in range(4)]
    )
    assert total_norm(noisy) == pytest.approx(500 * math.sqrt(4000), rel=0.05)


def test_without_noise_the_sum_is_exactly_the_sum_of_clipped_gradients(tmp_path):
    from dp_lora.privacy.gradients import micro_batches
    from dp_lora.privacy.sums import sum_over_units

    directions = torch.tensor([[3.0, 4.0], [0.03, 0.04], [-6.0, 8.0]])
    loss = linear_loss(directions)(None)
    parameters = {"w": torch.zeros(2)}
    total, norms, _ = sum_over_units(loss, parameters, micro_batches([[0], [1], [2]], 2, 100, CPU), 0.1)
    torch.testing.assert_close(total["w"].float(), torch.tensor([0.06 + 0.03 - 0.06, 0.08 + 0.04 + 0.08]))
    torch.testing.assert_close(norms, torch.tensor([5.0, 0.05, 10.0], dtype=torch.float64))


def test_poisson_includes_each_unit_with_probability_q_independently_of_the_others():
    q, n, draws = 0.3, 50, 4000
    included = np.zeros((draws, n))
    for step in range(draws):
        included[step, poisson_draw(n, q, replayed().numpy("sampling", step))] = 1
    spread = math.sqrt(q * (1 - q) / draws)
    assert np.abs(included.mean(0) - q).max() < 4.5 * spread
    sizes = included.sum(1)
    assert sizes.var() == pytest.approx(n * q * (1 - q), rel=0.15)
    off_diagonal = np.corrcoef(included.T) - np.eye(n)
    assert np.abs(off_diagonal).max() < 5 / math.sqrt(draws)
    # successive steps draw independently
    assert abs(np.corrcoef(included[:-1].ravel(), included[1:].ravel())[0, 1]) < 0.02


def test_a_mutant_that_shuffles_into_batches_of_fixed_size_fails_the_poisson_check():
    q, n, draws = 0.3, 50, 2000
    rng = np.random.default_rng(0)
    sizes = np.array([len(rng.permutation(n)[: int(q * n)]) for _ in range(draws)])
    assert sizes.var() != pytest.approx(n * q * (1 - q), rel=0.15)


def test_sample_rate_one_takes_everybody():
    assert poisson_draw(7, 1.0, replayed().numpy("sampling", 0)).tolist() == list(range(7))


def test_an_empty_draw_is_a_step_with_noise_alone_and_a_ledger_line(tmp_path):
    plan = plan_of(sample_rate=1e-9, noise_multiplier=3.0, max_grad_norm=0.1)
    directions = torch.ones(3, 2000)
    noisy, facts = one_step(tmp_path, plan, directions, [[0], [1], [2]])
    assert facts.units == 0
    assert math.isnan(facts.loss)
    assert stats.kstest(noisy["w"].numpy(), "norm", args=(0, 0.3)).pvalue > 1e-3
    assert Ledger(tmp_path / "ledger.jsonl").counted_steps(plan) == 1


def test_the_ledger_line_is_written_before_the_noise_is_drawn(tmp_path, monkeypatch):
    from dp_lora.privacy import step as module

    seen = []
    ledger = Ledger(tmp_path / "ledger.jsonl")

    def spy(total, std, generator):
        seen.append(ledger.counted_steps(plan_of()))
        return add_noise(total, std, generator)

    monkeypatch.setattr(module, "add_noise", spy)
    one_step(tmp_path, plan_of(), torch.ones(2, 3), [[0], [1]])
    assert seen == [1]


def test_a_step_that_cannot_be_written_down_draws_no_noise(tmp_path, monkeypatch):
    from dp_lora.privacy import step as module

    def full_disk(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    drawn = []
    monkeypatch.setattr(Ledger, "append", full_disk)
    monkeypatch.setattr(module, "add_noise", lambda *a: drawn.append(a))
    with pytest.raises(OSError, match="No space left"):
        one_step(tmp_path, plan_of(), torch.ones(2, 3), [[0], [1]])
    assert not drawn


def test_automatic_clipping_is_the_plan_s_and_leaves_the_noise_as_it_is(tmp_path):
    directions = torch.randn(12, 500, generator=torch.Generator().manual_seed(1))
    plan = plan_of(sample_rate=1.0, max_grad_norm=0.5, noise_multiplier=2.0, clipping=AUTOMATIC)
    noisy, facts = one_step(tmp_path, plan, directions, [[i] for i in range(12)], physical=5)
    norms = directions.double().norm(dim=1, keepdim=True)
    silent = (directions * (0.5 / (norms + STABILITY))).sum(0)
    assert stats.kstest((noisy["w"] - silent).numpy(), "norm", args=(0, 1.0)).pvalue > 1e-3
    assert facts.clipped_share == 1.0
    # these are two plans: neither may continue the other's ledger
    with pytest.raises(InputError, match="belongs to another plan"):
        Ledger(tmp_path / "ledger.jsonl").counted_steps(replace(plan, clipping=FLAT))


def test_neighbours_differ_by_one_clipped_gradient_and_share_the_rest(tmp_path):
    """With the same coins for all others, adding a unit moves the noisy sum by at most max_grad_norm."""
    plan = plan_of(sample_rate=1.0, max_grad_norm=0.2)
    directions = torch.randn(9, 30, generator=torch.Generator().manual_seed(0))
    small, _ = one_step(tmp_path, plan, directions, [[i] for i in range(8)])
    large, _ = one_step(tmp_path / "large", plan, directions, [[i] for i in range(9)])
    moved = total_norm(difference(large, small))
    assert moved == pytest.approx(0.2, rel=1e-5)


def test_a_person_with_many_pictures_counts_once(tmp_path):
    plan = no_privacy(sample_rate=1.0, unit="person")
    directions = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    total, facts = one_step(tmp_path, plan, directions, [[0, 1, 2], [3]])
    assert facts.units == 2
    torch.testing.assert_close(total["w"], torch.tensor([1.0, 1.0]))
