import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dp_lora.data.layout import read_dataset
from dp_lora.data.pixels import to_pixels
from dp_lora.errors import InputError
from dp_lora.models.autoencoder import encode
from dp_lora.models.folder import load_vae
from dp_lora.models.info import load_info, model_digest
from dp_lora.training import pictures as pictures_module
from dp_lora.training.autoencoder import AutoencoderTraining, train_autoencoder
from tests.support.public_stage import OVERRIDES, Heard, stage_config, write_pictures

ADVERSARIAL = "autoencoder.disc_start=2"


def train(
    tmp_path: Path, name: str, overrides: str = "", working: str | None = None, checkpoint_seconds: float = 60
) -> tuple[Path, Heard]:
    data, events = tmp_path / "data", Heard()
    if not data.exists():
        write_pictures(data)
    out = tmp_path / name
    folder = tmp_path / (working or f"{name}-working")
    train_autoencoder(stage_config(overrides), data, folder, out, events, checkpoint_seconds)
    return out, events


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException) -> list[int]:
    done: list[int] = []
    original = AutoencoderTraining.training_step

    def stopping(self, number):
        if number == step:
            raise error
        done.append(number)
        return original(self, number)

    monkeypatch.setattr(AutoencoderTraining, "training_step", stopping)
    return done


@pytest.mark.slow
def test_training_lowers_the_reconstruction_loss(tmp_path):
    _, events = train(tmp_path, "ae", "autoencoder.epochs=40")
    losses = events.values("mse")
    assert len(losses) == 2
    assert losses[1] < 0.6 * losses[0]


def test_latents_of_the_public_pictures_have_mean_zero_and_std_one_per_channel(tmp_path):
    out, _ = train(tmp_path, "ae")
    pixels = to_pixels(read_dataset(tmp_path / "data", ["A", "B"], "train").images(slice(None)))
    with torch.no_grad():
        latents = encode(load_vae(out), pixels).double()
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(3).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3), correction=0), torch.ones(3).double(), atol=1e-5, rtol=0)


def test_the_folder_says_what_it_was_trained_on_and_holds_a_legible_grid(tmp_path):
    out, events = train(tmp_path, "ae")
    info = load_info(out)
    assert info["privacy_status"] == "public"
    assert info["trained_on"]["source"] == "letters"
    assert events.images == {"reconstructions": out / "reconstructions.png"}
    with Image.open(out / "reconstructions.png") as grid:
        assert min(grid.size) > 100
    assert list((tmp_path / "ae-working").iterdir()) == []


@pytest.mark.parametrize("overrides", ["", ADVERSARIAL])
def test_equal_seeds_give_equal_weights_and_other_seeds_do_not(tmp_path, overrides):
    first, _ = train(tmp_path, "first", overrides)
    torch.rand(7)  # the process's own random state must not matter
    second, _ = train(tmp_path, "second", overrides)
    third, _ = train(tmp_path, "third", f"{overrides} experiment.seed=1")
    assert model_digest(first) == model_digest(second) != model_digest(third)


@pytest.mark.parametrize("overrides", ["", ADVERSARIAL])
def test_an_interrupted_training_ends_with_the_weights_of_an_unbroken_one(tmp_path, monkeypatch, overrides):
    unbroken, _ = train(tmp_path, "unbroken", overrides)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, "resumed", overrides, checkpoint_seconds=0)
    assert not (tmp_path / "resumed").exists()
    done = interrupt_at(monkeypatch, 99, KeyboardInterrupt())
    resumed, events = train(tmp_path, "resumed", overrides)
    assert done == [3, 4]
    assert events.messages == ["autoencoder: goes on at step 3 of 5"]
    assert model_digest(resumed) == model_digest(unbroken)


def test_other_settings_do_not_go_on_from_a_checkpoint(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, RuntimeError("power"))
        with pytest.raises(RuntimeError, match="power"):
            train(tmp_path, "ae", working="working", checkpoint_seconds=0)
    done = interrupt_at(monkeypatch, 99, KeyboardInterrupt())
    train(tmp_path, "ae", "autoencoder.lr=1e-3", working="working")
    assert done == [0, 1, 2, 3, 4]


class Payload:
    def __reduce__(self):
        return os.system, ("touch PWNED",)


def save_payload(path):
    torch.save({"state_dict": {}, "payload": Payload()}, path)


def cut(path):
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize("damage", [save_payload, cut])
def test_a_checkpoint_is_never_unpickled_freely_and_a_broken_one_is_named(tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, "ae", checkpoint_seconds=0)
    (checkpoint,) = (tmp_path / "ae-working").rglob("last.ckpt")
    damage(checkpoint)
    with pytest.raises(InputError, match=r"last\.ckpt: cannot be read.*delete it"):
        train(tmp_path, "ae")
    assert not (tmp_path / "PWNED").exists()


def test_the_discriminator_takes_part_from_its_step_on(tmp_path):
    _, events = train(tmp_path, "ae", "autoencoder.disc_start=3 autoencoder.epochs=2")
    assert len(events.values("discriminator")) == 1
    _, events = train(tmp_path, "later", "autoencoder.disc_start=5 autoencoder.epochs=2")
    assert events.values("discriminator") == []


def test_loss_weights_are_those_of_the_config(tmp_path):
    _, events = train(tmp_path, "ae", "autoencoder.mse_weight=2 autoencoder.kl_weight=0.25")
    mse, l1, kl, loss = (events.values(name)[0] for name in ("mse", "l1", "kl", "loss"))
    assert loss == pytest.approx(2 * mse + 0.3 * l1 + 0.25 * kl, rel=1e-5)


def test_the_kl_divergence_is_summed_over_the_latent_and_divided_by_the_pixel_values(tmp_path):
    data = write_pictures(tmp_path / "data")
    dataset = read_dataset(data, ["A", "B"], "train")
    pictures = pictures_module.Pictures(dataset)
    module = AutoencoderTraining(stage_config(), pictures, len(dataset), None)
    pixels = pictures(module.order.rows(0))
    posterior = module.vae.encode(pixels).latent_dist
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).flatten(1).sum(1) / 64
    monkey = {}
    module.set_lr = lambda lr: None
    module._optimizers = lambda: [None]
    module._update = lambda optimizer, loss: monkey.update(loss=loss)
    losses = module.training_step(0)
    torch.testing.assert_close(losses["kl"], kl.mean(), atol=1e-6, rtol=1e-5)
    assert monkey["loss"] is losses["loss"]


def test_a_loss_that_is_not_finite_stops_with_one_line(tmp_path):
    with pytest.raises(InputError, match="no longer finite at step 5; lower"):
        train(tmp_path, "ae", "autoencoder.lr=1e30")


def test_missing_lpips_weights_are_one_line_that_says_what_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(InputError, match=r"fetch https://.*vgg16-397923af\.pth to .*checkpoints") as caught:
        train(tmp_path, "ae", "autoencoder.lpips_weight=1")
    assert "\n" not in str(caught.value)


def test_pictures_read_row_by_row_are_those_kept_in_memory(tmp_path, monkeypatch):
    dataset = read_dataset(write_pictures(tmp_path / "data"), ["A", "B"], "train")
    kept = pictures_module.Pictures(dataset)(np.array([7, 2]))
    monkeypatch.setattr(pictures_module, "IN_MEMORY_BYTES", 0)
    read = pictures_module.Pictures(dataset)(np.array([7, 2]))
    assert torch.equal(kept, read)
    assert torch.equal(kept, to_pixels(dataset.images([7, 2])))


@pytest.mark.slow
def test_lpips_on_vgg_is_zero_for_equal_pictures_and_pulls_reconstructions_towards_them(tmp_path, monkeypatch):
    from torchvision.models import vgg16

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    # random weights instead of the trained ones, which are a download
    torch.save(vgg16(weights=None).state_dict(), tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth")
    from dp_lora.training.perceptual import Perceptual

    perceptual = Perceptual(16, torch.device("cpu"))
    pixels = torch.rand(2, 1, 16, 16) * 2 - 1
    other = (pixels + 3 * torch.rand(2, 1, 16, 16)).requires_grad_()
    assert perceptual(pixels, pixels).item() == 0
    distance = perceptual(pixels, other)
    (gradient,) = torch.autograd.grad(distance, other)
    step = other - 1e-2 * distance.item() * gradient / gradient.norm()
    assert perceptual(pixels, step) < distance
    with pytest.raises(InputError, match="at least 16 pixels"):
        Perceptual(8, torch.device("cpu"))
    write_pictures(tmp_path / "data", size=16)
    _, events = train(tmp_path, "ae", "autoencoder.lpips_weight=1 public.size=16 autoencoder.epochs=0.4")
    assert len(events.values("lpips")) == 1


KILLED = """
import sys
from pathlib import Path
from dp_lora.config import load
from dp_lora.events import Events
from dp_lora.training.autoencoder import train_autoencoder
folder = Path(sys.argv[1])
config = load("mnist5k", overrides=sys.argv[2])
train_autoencoder(config, folder / "data", folder / sys.argv[3], folder / "out" / sys.argv[3], Events(), 0)
"""


@pytest.mark.slow
def test_a_training_killed_again_and_again_ends_with_the_weights_of_an_unbroken_one(tmp_path):
    write_pictures(tmp_path / "data", 40)
    overrides = f"{OVERRIDES} {ADVERSARIAL} autoencoder.epochs=6"

    def start(name: str) -> subprocess.Popen:
        command = [sys.executable, "-c", KILLED, str(tmp_path), overrides, name]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    unbroken = start("unbroken")
    assert unbroken.wait(timeout=250) == 0
    for kill in range(2):
        process = start("killed")
        wait_for_new_checkpoint(tmp_path / "killed", time.time())
        time.sleep(0.1 * kill)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        assert not (tmp_path / "out" / "killed").exists()
    final = start("killed")
    _, stderr = final.communicate(timeout=250)
    assert final.returncode == 0
    assert "goes on at step" in stderr
    assert model_digest(tmp_path / "out" / "killed") == model_digest(tmp_path / "out" / "unbroken")


def wait_for_new_checkpoint(folder: Path, since: float) -> None:
    while time.time() < since + 120:
        if any(path.stat().st_mtime > since for path in folder.rglob("last.ckpt")):
            return
        time.sleep(0.01)
    raise AssertionError("no checkpoint in two minutes")
