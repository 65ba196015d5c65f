from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dp_lora.diffusion import diffuse, target
from dp_lora.errors import InputError
from dp_lora.models.folder import load_model, load_vae, module_digest
from dp_lora.models.info import load_info, model_digest
from dp_lora.training.autoencoder import train_autoencoder
from dp_lora.training.ldm import LdmTraining, train_ldm
from dp_lora.training.moving_average import growing_weight, update_average
from tests.support.public_stage import Heard, stage_config, write_pictures


@pytest.fixture(scope="module")
def public(tmp_path_factory) -> Path:
    """A folder with pictures (data) and an autoencoder (ae)."""
    folder = tmp_path_factory.mktemp("public")
    write_pictures(folder / "data")
    train_autoencoder(stage_config(), folder / "data", folder / "working", folder / "ae", Heard())
    return folder


def train(public: Path, out: Path, overrides: str = "", checkpoint_seconds: float = 60) -> Heard:
    events = Heard()
    working = out.with_name(f"{out.name}-working")
    train_ldm(stage_config(overrides), public / "data", public / "ae", working, out, events, checkpoint_seconds)
    return events


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> list[int]:
    done: list[int] = []
    original = LdmTraining.training_step

    def stopping(self, number):
        if number == step:
            raise KeyboardInterrupt
        done.append(number)
        return original(self, number)

    monkeypatch.setattr(LdmTraining, "training_step", stopping)
    return done


def latents(n: int = 12) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.standard_normal((n, 3, 4, 4)).astype(np.float32), np.arange(n) % 2


def test_the_folder_is_a_complete_model_with_the_autoencoder_it_was_trained_on(public, tmp_path):
    events = train(public, tmp_path / "ldm")
    model = load_model(tmp_path / "ldm")
    assert module_digest(model.vae) == module_digest(load_vae(public / "ae"))
    assert model.classes == ["A", "B"]
    assert model.class_embedding.shape == (3, 8)
    assert model.scheduler.config["prediction_type"] == "v_prediction"
    info = load_info(tmp_path / "ldm")
    assert info["privacy_status"] == "public"
    assert info["config"]["autoencoder"]["block_out_channels"] == [8, 16]
    assert events.images == {"samples": tmp_path / "ldm" / "samples.png"}
    with Image.open(tmp_path / "ldm" / "samples.png") as grid:
        assert min(grid.size) > 100


def test_without_class_dropout_there_is_no_null_row(public, tmp_path):
    train(public, tmp_path / "ldm", "ldm.class_dropout=0")
    model = load_model(tmp_path / "ldm")
    assert model.null_row is None
    assert len(model.class_embedding) == 2


@pytest.mark.slow
def test_training_lowers_the_loss_on_separable_latents(public, tmp_path):
    events = train(public, tmp_path / "ldm", "ldm.epochs=40")
    losses = events.values("loss")
    assert len(losses) == 2
    assert losses[1] < 0.9 * losses[0]


@pytest.mark.slow
def test_equal_seeds_give_equal_weights_and_other_seeds_do_not(public, tmp_path):
    for name, seed in (("first", 0), ("second", 0), ("third", 1)):
        train(public, tmp_path / name, f"experiment.seed={seed}")
    digests = [model_digest(tmp_path / name) for name in ("first", "second", "third")]
    assert digests[0] == digests[1] != digests[2]


def test_an_interrupted_training_ends_with_the_weights_of_an_unbroken_one(public, tmp_path, monkeypatch):
    train(public, tmp_path / "unbroken")
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(public, tmp_path / "resumed", checkpoint_seconds=0)
    done = stop_at(monkeypatch, 99)
    events = train(public, tmp_path / "resumed")
    assert done == [2, 3, 4]
    assert events.messages == ["ldm: goes on at step 2 of 5"]
    assert model_digest(tmp_path / "resumed") == model_digest(tmp_path / "unbroken")


def test_the_average_is_saved_and_follows_the_weights_by_the_configured_decay():
    average, current = [torch.zeros(3)], [torch.ones(3)]
    update_average(average, current, growing_weight(0, decay=0.5))
    torch.testing.assert_close(average[0], torch.full((3,), 1 - 2 / 11))
    update_average(average, current, growing_weight(1000, decay=0.5))
    torch.testing.assert_close(average[0], torch.full((3,), 1 - 1 / 11))


def test_saved_weights_are_those_of_the_average(public, tmp_path, monkeypatch):
    seen = {}
    original = LdmTraining.on_train_end

    def keep(self):
        seen.update({name: tensor.clone() for name, tensor in self.state_dict().items()})
        original(self)

    monkeypatch.setattr(LdmTraining, "on_train_end", keep)
    train(public, tmp_path / "ldm", "ldm.ema_decay=0.99")
    model = load_model(tmp_path / "ldm")
    name = "conv_in.weight"
    saved = model.denoiser.state_dict()[name]
    assert torch.equal(saved, seen[f"average.unet.{name}"])
    assert not torch.equal(saved, seen[f"model.unet.{name}"])
    assert torch.equal(model.class_embedding, seen["average.embedding.weight"])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_the_diffusion_loss_on_the_noised_latents(prediction_type):
    module = LdmTraining(stage_config(f"ldm.prediction_type={prediction_type} ldm.batch_size=12"), *latents())
    module.set_lr = lambda lr: None
    seen = {}

    def oracle(noisy, t, labels):
        seen.update(t=t, labels=labels)
        rows = torch.from_numpy(module.latents[module.order.rows(0)])
        a = module.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        noise = (noisy - a.sqrt() * rows) / (1 - a).sqrt()
        assert torch.equal(
            diffuse(rows, noise, module.scheduler.alphas_cumprod, t).isfinite().all(), torch.tensor(True)
        )
        return target(rows, noise, module.scheduler.alphas_cumprod, t, prediction_type)

    module.model.forward = oracle
    assert module.training_step(0)["loss"].item() < 1e-6
    assert seen["t"].min() >= 0
    assert seen["t"].unique().numel() > 6


def test_the_configured_share_of_rows_sees_the_null_class_and_the_others_their_own():
    module = LdmTraining(stage_config("ldm.class_dropout=0.25 ldm.batch_size=12"), *latents())
    module.set_lr = lambda lr: None
    seen = []

    def watch(noisy, t, labels):
        seen.append(labels)
        return noisy

    module.model.forward = watch
    for step in range(200):
        module.training_step(step)
    labels = torch.stack(seen)
    expected = torch.stack([module.labels[module.order.rows(step)] for step in range(200)])
    dropped = labels == 2
    # with 2,400 rows the standard deviation is 0.009
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.045)
    assert torch.equal(labels[~dropped], expected[~dropped])


def test_the_gradient_is_clipped_to_the_configured_norm(public, tmp_path, monkeypatch):
    norms = []
    original = LdmTraining.optimizer_step

    def measured(self, *args, **kwargs):
        original(self, *args, **kwargs)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())

    monkeypatch.setattr(LdmTraining, "optimizer_step", measured)
    train(public, tmp_path / "ldm", "ldm.gradient_clip=0.01")
    assert len(norms) == 5
    assert max(norms) == pytest.approx(0.01, rel=1e-3)


def test_an_autoencoder_for_other_pictures_is_refused(public, tmp_path):
    with pytest.raises(InputError, match=r"8 pixels and 1 channels, but public\.size=16"):
        train(public, tmp_path / "ldm", "public.size=16")
