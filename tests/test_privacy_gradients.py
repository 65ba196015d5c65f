"""Checks 1 and 2: per-unit gradients are right, and one unit moves the sum by at most max_grad_norm."""

import numpy as np
import pytest
import torch

from benchmarks.setups import stock_copy
from benchmarks.steps import StockModel
from dp_lora.diffusion import diffuse, loss_per_row, target
from dp_lora.models.adapters import EMBEDDING
from dp_lora.models.targets import lora_targets
from dp_lora.privacy import clipping
from dp_lora.privacy.clipping import STABILITY, clip_factors, clipped_sum
from dp_lora.privacy.gradients import micro_batches, part_gradients
from dp_lora.privacy.plan import AUTOMATIC, FLAT
from dp_lora.privacy.randomness import ItemStreams
from dp_lora.privacy.sums import sum_over_units, unit_gradients
from dp_lora.training.private_loss import diffusion_loss
from tests.support.tiny import difference, no_privacy, tiny_adapter, tiny_config, tiny_latents, tiny_model, total_norm

CPU = torch.device("cpu")


def loop_over_units(config, model, adapter, parameters, latents, labels, units, k, seed):
    """Reference: one ordinary backward pass per unit, over the mean of its rows' losses."""
    draws = ItemStreams(seed)
    alphas = model.scheduler.alphas_cumprod
    kind = model.scheduler.config["prediction_type"]
    found = []
    for unit in units:
        losses = []
        for picture in unit:
            for _ in range(k):
                t = torch.tensor(int(draws[picture].integers(config.train.timestep_min, config.train.timestep_max)))
                noise = torch.from_numpy(draws[picture].standard_normal(latents.shape[1:], dtype=np.float32))[None]
                x0 = torch.from_numpy(latents[picture])[None]
                context = adapter.embedding[labels[picture]][None, None]
                prediction = model.denoiser(diffuse(x0, noise, alphas, t[None]), t[None], context).sample
                losses.append(loss_per_row(prediction, target(x0, noise, alphas, t[None], kind)))
        loss = torch.cat(losses).mean()
        found.append(torch.autograd.grad(loss, list(parameters.values()), allow_unused=True))
    names = list(parameters)
    return {
        name: torch.stack([g[i] if g[i] is not None else torch.zeros_like(parameters[name]) for g in found])
        for i, name in enumerate(names)
    }


@pytest.mark.parametrize("targets", ["default", "study", "attn1.to_q,attn2.to_out.0"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("units", [[[0], [1, 2, 3], [4], [5]], [[0, 1], [2, 3], [4, 5]]], ids=["uneven", "even"])
def test_unit_gradients_equal_a_loop_over_units_with_autograd(tmp_path, targets, k, units):
    config, model = tiny_config(), tiny_model(tmp_path)
    adapter = tiny_adapter(model, targets)
    parameters = adapter.parameters("AB")
    latents, labels = tiny_latents()
    expected = loop_over_units(config, model, adapter, parameters, latents, labels, units, k, seed=11)

    loss = diffusion_loss(config, model, latents, labels, CPU)(ItemStreams(11))
    (rows,) = micro_batches(units, k, 6 * k, CPU)
    parts, _ = part_gradients(loss, parameters, rows)
    gradients = unit_gradients(parts, rows.units, {})
    for unit in range(len(units)):
        ours = {name: value[unit] for name, value in gradients.items()}
        reference = {name: value[unit] for name, value in expected.items()}
        assert total_norm(difference(ours, reference)) < 1e-5 * total_norm(reference)
    assert total_norm(expected) > 0
    assert gradients[EMBEDDING].abs().sum() > 0


def test_opacus_finds_the_same_per_sample_gradients_for_a_linear_layer():
    from opacus import GradSampleModule

    from dp_lora.models.adapters import UnitLinear

    torch.manual_seed(0)
    x, y = torch.randn(5, 3, 7), torch.randn(5, 3, 4)
    reference = GradSampleModule(torch.nn.Linear(7, 4, bias=False), batch_first=True, loss_reduction="sum")
    weight = reference._module.weight
    (reference(x) - y).square().mean((1, 2)).sum().backward()

    layer = UnitLinear(7, 4, bias=False)
    copies = weight.detach()[None].repeat(5, 1, 1).requires_grad_()
    layer.unit_weight = (copies, len(x))
    (layer(x) - y).square().mean((1, 2)).sum().backward()
    torch.testing.assert_close(copies.grad, weight.grad_sample, rtol=1e-5, atol=1e-7)


def test_opacus_finds_the_same_per_sample_gradients_for_the_whole_adapter_and_the_class_embedding(tmp_path):
    from opacus import GradSampleModule

    config, model = tiny_config(), tiny_model(tmp_path)
    embedding = torch.zeros(2, config.ldm.cross_attention_dim)
    stock = StockModel(stock_copy(model.denoiser), lora_targets("default"), 2, embedding)
    adapter = tiny_adapter(model)
    parameters = adapter.parameters("AB")
    theirs = dict(stock.named_parameters())
    peft = {
        name: theirs["embedding.weight" if name == EMBEDDING else f"unet.{name}.default.weight"] for name in parameters
    }
    with torch.no_grad():
        for name, parameter in parameters.items():
            peft[name].copy_(parameter)
    latents, labels = tiny_latents()
    loss = diffusion_loss(config, model, latents, labels, CPU)(ItemStreams(11))
    (rows,) = micro_batches([[picture] for picture in range(6)], 1, 6, CPU)
    ours, _ = part_gradients(loss, parameters, rows)

    hooked = GradSampleModule(stock, batch_first=True, loss_reduction="sum")
    draws, alphas = ItemStreams(11), model.scheduler.alphas_cumprod
    low, high = config.train.timestep_min, config.train.timestep_max
    t = torch.tensor([int(draws[picture].integers(low, high)) for picture in range(6)])
    noise = np.stack([draws[picture].standard_normal(latents.shape[1:], dtype=np.float32) for picture in range(6)])
    x0, noise = torch.from_numpy(latents), torch.from_numpy(noise)
    prediction = hooked(diffuse(x0, noise, alphas, t), t, torch.from_numpy(labels))
    wanted = target(x0, noise, alphas, t, model.scheduler.config["prediction_type"])
    loss_per_row(prediction, wanted).sum().backward()
    for name, parameter in peft.items():
        assert parameter.grad_sample.abs().sum() > 0, name
        torch.testing.assert_close(ours[name], parameter.grad_sample, rtol=1e-4, atol=1e-6, msg=name)


def adversarial(kind: str) -> np.ndarray:
    latent = np.random.default_rng(9).standard_normal((2, 8, 8)).astype(np.float32)
    return {
        "huge": latent * np.float32(1e8),
        "zero": latent * 0,
        "nan": np.where(latent > 1, np.float32("nan"), latent),
        "inf": np.where(latent > 1, np.float32("inf"), latent),
    }[kind]


@pytest.mark.parametrize("kind", ["huge", "zero", "nan", "inf"])
@pytest.mark.parametrize(
    ("k", "first", "clip"),
    [
        (1, True, FLAT),
        (4, False, FLAT),
        (4, True, FLAT),
        pytest.param(16, True, FLAT, marks=pytest.mark.slow),
        (4, True, AUTOMATIC),
    ],
)
def test_one_person_moves_the_sum_by_at_most_max_grad_norm_with_k_draws(tmp_path, kind, k, first, clip):
    config, model = tiny_config(), tiny_model(tmp_path)
    parameters = tiny_adapter(model).parameters("AB")
    latents, labels = tiny_latents()
    latents = np.concatenate([latents, adversarial(kind)[None]])
    labels = np.append(labels, 1)
    bound = 0.01

    def total(units):
        loss = diffusion_loss(config, model, latents, labels, CPU)(ItemStreams(2))
        return sum_over_units(loss, parameters, micro_batches(units, k, 5, CPU), bound, clip)[0]

    without = total([[0], [1, 2], [3]])
    with_person = total([[6], [0], [1, 2], [3]] if first else [[0], [1, 2], [3], [6]])
    assert all(torch.isfinite(value).all() for value in with_person.values())
    assert total_norm(difference(with_person, without)) <= bound * (1 + 1e-6)


def test_a_mutant_that_clips_each_draw_apart_breaks_the_bound(tmp_path):
    """The published fault: the clip treats k rows of one person as k people."""
    config, model = tiny_config("train.timestep_min=980 train.timestep_max=982"), tiny_model(tmp_path)
    parameters = tiny_adapter(model).parameters("AB")
    latents, labels = tiny_latents()
    loss = diffusion_loss(config, model, latents * 50, labels, CPU)(ItemStreams(2))
    bound, k = 0.01, 4
    mutant = sum_over_units(loss, parameters, micro_batches([[0]] * k, 1, k, CPU), bound)[0]
    ours = sum_over_units(loss, parameters, micro_batches([[0]], k, k, CPU), bound)[0]
    assert total_norm(ours) <= bound * (1 + 1e-6)
    assert total_norm(mutant) > 1.5 * bound


def test_a_mutant_that_clips_each_micro_batch_apart_breaks_the_bound(tmp_path):
    config, model = tiny_config("train.timestep_min=980 train.timestep_max=982"), tiny_model(tmp_path)
    parameters = tiny_adapter(model).parameters("AB")
    latents, labels = tiny_latents()
    bound, k = 0.01, 8
    loss = diffusion_loss(config, model, latents * 50, labels, CPU)(ItemStreams(2))
    mutant = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for rows in micro_batches([[0]], k, 2, CPU):
        gradients, _ = part_gradients(loss, parameters, rows)
        for name, value in clipped_sum(gradients, bound)[0].items():
            mutant[name] += value
    ours = sum_over_units(loss, parameters, micro_batches([[0]], k, 2, CPU), bound)[0]
    assert total_norm(ours) <= bound * (1 + 1e-6)
    assert total_norm(mutant) > 1.5 * bound


@pytest.mark.parametrize("physical_batch_size", [1, 3, 7])
def test_the_sum_does_not_depend_on_the_physical_batch_size(tmp_path, physical_batch_size):
    config, model = tiny_config(), tiny_model(tmp_path)
    parameters = tiny_adapter(model).parameters("AB")
    latents, labels = tiny_latents()
    units = [[0, 1, 2], [3], [4, 5]]

    def total(size):
        loss = diffusion_loss(config, model, latents, labels, CPU)(ItemStreams(4))
        return sum_over_units(loss, parameters, micro_batches(units, 2, size, CPU), 0.01)

    whole, norms, losses = total(12)
    cut, cut_norms, cut_losses = total(physical_batch_size)
    assert total_norm(difference(cut, whole)) < 1e-5 * total_norm(whole)
    torch.testing.assert_close(cut_norms, norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(cut_losses, losses, rtol=1e-5, atol=0)
    assert len(norms) == 3


def test_clipping_handles_zero_and_non_finite_norms():
    norms = torch.tensor([0.0, 0.5, 2.0, float("inf"), float("nan")], dtype=torch.float64)
    assert clip_factors(norms, 1.0).tolist() == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert clip_factors(norms, float("inf")).tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]


# norms of gradients at every scale: 0, the smallest of float32 and of float64's squares, MNIST's own, the largest
SCALES = (0.0, 1e-45, 1e-38, 1e-19, 1e-8, 1e-3, STABILITY, 0.05, 1.0, 1e4, 1e19, 1e30, 1e38)


def adversarial_gradients(dtype):
    """Two tensors (many, ...): gradients with random directions or one nonzero coordinate, at every scale."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    directions = torch.cat([directions, torch.eye(12, dtype=torch.float64), torch.ones(1, 12, dtype=torch.float64)])
    directions = directions / directions.norm(dim=1, keepdim=True)
    gradients = torch.cat([scale * directions for scale in SCALES]).to(dtype)
    return {"a": gradients[:, :8].reshape(-1, 2, 4), "b": gradients[:, 8:]}


def within(bound, gradients, clip):
    """Whether clipping scales each of `gradients` to norm `bound` at most, up to float64's last bits."""
    norms = []
    for unit in range(len(gradients["b"])):
        one = {name: gradient[unit : unit + 1].clone() for name, gradient in gradients.items()}
        norms.append(total_norm(clipped_sum(one, bound, clip)[0]))
    return all(norm <= bound * (1 + 1e-12) for norm in norms)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bound", [1e-6, 0.05, 1e6])
@pytest.mark.parametrize("clip", [FLAT, AUTOMATIC])
def test_whatever_a_gradient_is_it_is_scaled_to_norm_max_grad_norm_at_most(clip, bound, dtype):
    assert within(bound, adversarial_gradients(dtype), clip)


def each_tensor_apart(gradients):
    return torch.stack([g.flatten(1).double().norm(dim=1) for g in gradients.values()]).max(0).values


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("unit_norms", each_tensor_apart),
        ("unit_norms", lambda gradients: torch.cat([g.flatten(1) for g in gradients.values()], 1).norm(dim=1).double()),
        ("STABILITY", -STABILITY / 2),
        ("STABILITY", 0.0),
    ],
    ids=["the largest tensor's norm", "a norm in the gradients' own type", "taken off the norm", "nothing is added"],
)
def test_mutants_of_automatic_clipping_break_the_bound(monkeypatch, name, mutant):
    monkeypatch.setattr(clipping, name, mutant)
    assert not within(0.05, adversarial_gradients(torch.bfloat16), AUTOMATIC)


def test_automatic_clipping_is_what_its_authors_say_and_counts_a_small_gradient_as_much_as_a_large_one():
    gradients = {"a": torch.tensor([[3.0], [0.0], [300.0]]), "b": torch.tensor([[4.0], [0.0], [400.0]])}
    for unit, (norm, expected) in enumerate([(5.0, 0.2 * 5 / 5.01), (0.0, 0.0), (500.0, 0.2 * 500 / 500.01)]):
        total, norms = clipped_sum({n: g[unit : unit + 1].clone() for n, g in gradients.items()}, 0.2, AUTOMATIC)
        assert float(norms) == pytest.approx(norm)
        assert total_norm(total) == pytest.approx(expected, rel=1e-12)
    assert clip_factors(torch.tensor([0.0, 1.0, float("inf"), float("nan")]), 1.0, AUTOMATIC).tolist() == [
        pytest.approx(100.0), pytest.approx(1 / 1.01), 0.0, 0.0,
    ]  # fmt: skip
    without = clip_factors(torch.tensor([0.0, 9.0, float("nan")]), float("inf"), AUTOMATIC)
    assert without.tolist() == [1.0, 1.0, 0.0]


def test_one_broken_person_leaves_the_sum_of_all_others_as_it_was():
    gradients = {"w": torch.tensor([[3.0, 4.0], [float("nan"), 1.0], [0.3, 0.4]])}
    total, norms = clipped_sum(gradients, 1.0)
    torch.testing.assert_close(total["w"].float(), torch.tensor([0.9, 1.2]))
    assert norms[1].isnan()


def test_without_privacy_nothing_is_clipped(tmp_path):
    assert no_privacy().max_grad_norm == float("inf")
    total, _ = clipped_sum({"w": torch.tensor([[30.0, 40.0]])}, no_privacy().max_grad_norm)
    assert total["w"].tolist() == [30.0, 40.0]
