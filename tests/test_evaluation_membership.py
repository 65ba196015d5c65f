"""Membership inference by loss: statistics worked out by hand, a model that knows its pictures by heart, captions."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from dp_lora.config import load
from dp_lora.data.layout import Picture, read_dataset, write_dataset
from dp_lora.data.pixels import to_pixels
from dp_lora.data.png import encode_png
from dp_lora.diffusion import loss_per_row, process_of
from dp_lora.evaluation import membership as module
from dp_lora.evaluation.intervals import bootstrap_interval
from dp_lora.evaluation.membership import auc, losses, membership_scores, true_positives
from dp_lora.models.adapters import with_embedding
from dp_lora.models.autoencoder import encode
from dp_lora.models.families.classes import ClassConditional
from dp_lora.models.folder import load_model
from tests.support.tiny import tiny_config, tiny_dataset, tiny_model
from tests.support.tiny_pipelines import SIZE, make_pipeline

CLASSES = ["x", "y"]


def test_auc_is_the_share_of_pairs_in_order_equal_ones_half():
    members, others = np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0])
    pairs = [float(a < b) + 0.5 * float(a == b) for a in members for b in others]
    assert auc(members, others) == pytest.approx(np.mean(pairs))
    assert auc(members, members + 10) == 1
    assert auc(members, members) == 0.5


def test_at_most_one_in_a_hundred_others_lies_below_the_limit():
    others = np.arange(200.0)
    # the limit is 2: of the 200 others, 0 and 1 lie below it
    assert true_positives(np.array([-1.0, 0.5, 1.9, 2.0, 50.0]), others) == pytest.approx(3 / 5)
    assert true_positives(others, others) == pytest.approx(0.01)
    assert true_positives(np.array([-1.0, 5.0]), np.arange(50.0)) == 0.5


def test_statistics_of_resamples_are_those_of_each_alone():
    generator = np.random.default_rng(0)
    members, others = generator.normal(size=(4, 120)), generator.normal(size=(4, 150))
    for statistic in (auc, true_positives):
        each = [statistic(a, b) for a, b in zip(members, others, strict=True)]
        np.testing.assert_allclose(statistic(members, others, axis=-1), each)


def test_the_interval_of_pictures_of_one_kind_holds_one_half():
    generator = np.random.default_rng(1)
    low, high = bootstrap_interval((generator.normal(size=300), generator.normal(size=300)), auc)
    assert low < 0.5 < high
    assert high - low < 0.15


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A model of classes x and y, its config, and training and held-out pictures of noise."""
    monkeypatch.setattr(module, "DRAWS", 6)
    config = tiny_config("sampling.batch_size=5")
    base = tiny_model(tmp_path, config)
    model = with_embedding(base, torch.randn(2, 6, generator=torch.Generator().manual_seed(1)), CLASSES)
    tiny_dataset(tmp_path / "data", 60)
    return model, config, *(read_dataset(tmp_path / "data", CLASSES, split) for split in ("train", "test"))


def test_losses_are_those_of_training_over_the_same_draws_for_all(world):
    model, config, real, _ = world
    rows = np.array([3, 0, 7, 11, 2, 40])
    process = process_of(model.scheduler, "base")
    latents = encode(model.vae, to_pixels(real.images(rows)))
    expected = np.zeros(len(rows))
    for draw in range(module.DRAWS):
        stream = np.random.default_rng([module.SEED, draw])
        t = process.time(stream, config.train.timestep_min, config.train.timestep_max)
        noise = torch.from_numpy(stream.standard_normal(latents.shape[1:], dtype=np.float32))
        for place, row in enumerate(rows):
            x_t, target = process.noised(latents[place : place + 1], noise[None], torch.tensor([t]))
            context = model.class_embedding[real.labels[row]][None, None]
            with torch.no_grad():
                predicted = model.denoiser(x_t, t, context).sample
            expected[place] += float(loss_per_row(predicted, target)) / module.DRAWS
    found = losses(model, config, real, rows, None)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(losses(model, config, real, rows[::-1].copy(), None)[::-1], found, rtol=1e-4)
    assert len(np.unique(found)) == len(rows)


def values(scores):
    return {one.metric: one for one in scores}


@dataclass(frozen=True)
class ByHeart(ClassConditional):
    """A denoiser that takes every noisy latent for one of its known pictures, the one that fits best."""

    known: Any = None
    alphas_cumprod: Any = None

    def predict(self, denoiser, x_t, t, conditions):
        a = self.alphas_cumprod[t].view(-1, 1, 1, 1, 1)
        noise = (x_t[:, None] - a.sqrt() * self.known) / (1 - a).sqrt()
        best = noise.square().mean(dim=(2, 3, 4)).argmin(dim=1)
        rows = torch.arange(len(x_t))
        return a[:, 0].sqrt() * noise[rows, best] - (1 - a[:, 0]).sqrt() * self.known[best]


def test_pictures_known_by_heart_are_told_from_held_out_ones_and_a_mutant_without_these_sees_nothing(world, tmp_path):
    model, config, real, test = world
    # with little noise it never takes one of its pictures for another
    config = replace(config, train=replace(config.train, timestep_min=0, timestep_max=100))
    known = encode(model.vae, to_pixels(real.images(slice(None))))
    model = replace(model, family=ByHeart(known=known, alphas_cumprod=model.scheduler.alphas_cumprod))
    found = values(membership_scores(model, config, real, test, tmp_path))
    for one in found.values():
        assert one.private
        assert (one.value, one.low, one.high) == (1, 1, 1)
    mutant = values(membership_scores(model, config, real, real, tmp_path))
    assert mutant["membership_auc"].value == 0.5


def test_pictures_that_no_model_saw_are_told_apart_by_chance_alone(world, tmp_path):
    model, config, real, test = world
    found = values(membership_scores(model, config, real, test, tmp_path))["membership_auc"]
    assert found.low <= 0.5 <= found.high


def test_captions_condition_each_picture_on_its_own_and_stay_in_the_private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "DRAWS", 2)
    config = load(
        "folder",
        {},
        "data.path=nowhere data.captions=true data.classes=[] data.n_public=40 data.size=32 data.channels=3 "
        "sampling.prompts=sun privacy.batch_size=8 train.timestep_min=0 sampling.batch_size=3",
    )
    model = load_model(make_pipeline(tmp_path / "base", "sd"))
    model = replace(model, info={**model.info, "size": SIZE})
    image = np.full((SIZE, SIZE, 3), 90, np.uint8)
    rows = [
        Picture(f"{split}-{i}.png", None, split, encode_png(image), None, (f"a quartzite {i % 3}", "another"))
        for split in ("train", "test")
        for i in range(4)
    ]
    write_dataset(tmp_path / "data", rows, {}, SIZE, 3, packed=False)
    real, test = (read_dataset(tmp_path / "data", [], split) for split in ("train", "test"))
    # all pictures are equal; their captions alone differ
    found = module._losses_of(model, config, real, 4, tmp_path / "kept")
    assert found[0] == pytest.approx(found[3], rel=1e-4)
    assert abs(found[0] - found[1]) > 1e-5 * found[0]
    scores = values(membership_scores(model, config, real, test, tmp_path / "kept"))
    assert scores["membership_auc"].value == pytest.approx(0.5)
    kept = tmp_path / "kept/captions"
    assert kept.stat().st_mode & 0o777 == 0o700
    assert list(kept.rglob("*.npy"))
