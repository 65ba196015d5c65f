"""Sampling: the inputs that decide an image, guidance, and the folder of samples."""

import json
import os
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from PIL import Image

import dp_lora.sampling.folder as folder_module
from dp_lora import files
from dp_lora.data.layout import read_dataset
from dp_lora.errors import InputError
from dp_lora.events import Events
from dp_lora.grids import CELL, GAP, draw_grid, write_grid
from dp_lora.models.families import FAMILIES
from dp_lora.models.folder import Model, load_model, save_model
from dp_lora.models.pipeline_index import steps_and_guidance
from dp_lora.sampling import SPLIT, balanced, draw, draw_pixels, model_fingerprint, sample
from dp_lora.sampling.ddim import timesteps
from dp_lora.sampling.noise import image_stream, next_noise
from tests.support.drawn_model import CLASSES, tiny_config, tiny_model
from tests.support.public_stage import Heard

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model(tiny_config())


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_an_image_depends_on_seed_class_and_index_alone_to_1e_4_in_any_batch(model, eta):
    sampling = replace(tiny_config().sampling, eta=eta)
    alone = torch.cat([draw_pixels(model, [c], [i], sampling, 7, CPU) for c, i in [(2, 0), (0, 5), (1, 3)]])
    together = draw_pixels(model, [0, 1, 1, 2, 0], [5, 3, 4, 0, 1], sampling, 7, CPU)[[3, 0, 1]]
    assert (alone - together).abs().max() < 1e-4
    assert (alone[0] - alone[1]).abs().max() > 0.05


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_an_image_is_bit_for_bit_the_same_at_equal_batch_size(model, eta):
    sampling = replace(tiny_config().sampling, eta=eta)
    one = draw_pixels(model, [0, 1, 2, 0], [5, 3, 0, 1], sampling, 7, CPU)
    other = draw_pixels(model, [1, 0, 1, 2], [3, 8, 9, 0], sampling, 7, CPU)
    assert torch.equal(one[1], other[0])
    assert torch.equal(one[2], other[3])


@pytest.mark.parametrize("other", [(2, "a", 2), (1, "b", 2), (1, "a", 3)], ids=["seed", "class", "index"])
def test_seed_class_and_index_each_change_the_noise(other):
    streams = [image_stream(*key) for key in ((1, "a", 2), (1, "a", 2), other)]
    first, again, changed = next_noise(streams, (3, 4, 4), CPU)
    assert torch.equal(first, again)
    assert not torch.isclose(first, changed).any()


def test_eta_noise_of_later_steps_is_fresh_and_standard_normal():
    streams = [image_stream(0, "a", i) for i in range(500)]
    one, two = next_noise(streams, (4, 8, 8), CPU), next_noise(streams, (4, 8, 8), CPU)
    assert abs(one.mean()) < 0.01
    assert abs(one.std() - 1) < 0.01
    assert abs((one * two).mean()) < 0.01


def test_class_noise_does_not_move_when_other_classes_are_added(model):
    sampling = replace(tiny_config().sampling, guidance_scale=1.0)
    more = replace(
        model,
        class_embedding=torch.cat([torch.zeros(1, 8), model.class_embedding]),
        info={**model.info, "classes": ["new", *CLASSES]},
    )
    assert torch.equal(draw_pixels(model, [1], [4], sampling, 0, CPU), draw_pixels(more, [2], [4], sampling, 0, CPU))


def plain_ddim(model: Model, label: int, stream, sampling) -> torch.Tensor:
    """One latent straight from the equations: DDIM's eq. 12 with eq. 16's sigma, guided predictions, no batching."""
    a = model.scheduler.alphas_cumprod.double()
    x = next_noise(stream, (3, 8, 8), CPU)
    chain = [1 + i * (1000 // sampling.steps) for i in reversed(range(sampling.steps))]
    for t in chain:
        e_cond, e_null = (
            model.denoiser(x, t, encoder_hidden_states=row.view(1, 1, -1)).sample
            for row in (model.class_embedding[label], model.class_embedding[-1])
        )
        v = e_null + sampling.guidance_scale * (e_cond - e_null)
        previous = t - 1000 // sampling.steps
        now, then = a[t], a[previous] if previous >= 0 else a[0]
        x0 = now.sqrt() * x - (1 - now).sqrt() * v
        noise = now.sqrt() * v + (1 - now).sqrt() * x
        sigma = sampling.eta * ((1 - then) / (1 - now) * (1 - now / then)).sqrt()
        x = then.sqrt() * x0 + (1 - then - sigma**2).sqrt() * noise
        if sampling.eta > 0:
            x += sigma * next_noise(stream, (3, 8, 8), CPU)
        x = x.float()
    return x


def plain_class(model: Model, x: torch.Tensor, stream) -> int:
    """The class with the least error of v at timesteps 450 and 650, each class at the same noise."""
    a, losses = model.scheduler.alphas_cumprod, torch.zeros(len(model.classes))
    for t in (450, 650):
        noise = next_noise(stream, (3, 8, 8), CPU)
        x_t, v = a[t].sqrt() * x + (1 - a[t]).sqrt() * noise, a[t].sqrt() * noise - (1 - a[t]).sqrt() * x
        for label in range(len(model.classes)):
            row = model.class_embedding[label].view(1, 1, -1)
            losses[label] += (model.denoiser(x_t, t, encoder_hidden_states=row).sample - v).square().mean()
    return int(losses.argmin())


def decoded(model: Model, x: torch.Tensor) -> torch.Tensor:
    return model.vae.decode(x).sample.clamp(-1, 1)


def test_bfloat16_changes_an_image_a_little_and_float32_is_what_a_config_gets(model):
    exact, rough = (tiny_config(f"sampling.precision={name}").sampling for name in ("float32", "bfloat16"))
    assert exact == tiny_config().sampling
    pixels, others = (draw_pixels(model, [0, 1], [0, 1], settings, 0, CPU) for settings in (exact, rough))
    assert others.dtype == torch.float32
    assert float((pixels - others).abs().max()) > 1e-4
    assert float((pixels - others).abs().mean()) < 0.02


def test_a_precision_that_nobody_set_is_refused_and_not_taken_for_float32(model):
    unset = replace(tiny_config().sampling, precision="???")
    with pytest.raises(InputError, match=r"sampling\.precision=\?\?\?: must be one of auto, float32, bfloat16"):
        draw(model, [0], [0], unset, 0, CPU)


@pytest.mark.parametrize(("scale", "eta"), [(0.0, 0.0), (1.0, 0.0), (3.0, 0.0), (3.0, 0.5), (3.0, 1.0)])
@torch.no_grad()
def test_guided_sampling_follows_the_equations(model, scale, eta):
    sampling = replace(tiny_config().sampling, guidance_scale=scale, eta=eta)
    expected = decoded(model, plain_ddim(model, 2, [image_stream(1, model.classes[2], 6)], sampling))
    assert (draw_pixels(model, [2], [6], sampling, 1, CPU) - expected).abs().max() < 1e-4


@torch.no_grad()
def test_an_image_is_drawn_anew_until_the_model_itself_takes_it_for_its_class(model):
    sampling = replace(tiny_config().sampling, guidance_scale=0.0, eta=1.0, attempts=3)  # 0: no class is aimed at
    labels, attempts = [0, 1, 2] * 4, []
    drawn = draw_pixels(model, labels, range(12), sampling, 0, CPU)
    for row, label in enumerate(labels):
        stream = [image_stream(0, model.classes[label], row)]
        for attempt in (1, 2, 3):  # noqa: B007 (read below)
            latent = plain_ddim(model, label, stream, sampling)
            if plain_class(model, latent, stream) == label:
                break
        attempts.append(attempt)
        assert (drawn[row] - decoded(model, latent)[0]).abs().max() < 1e-4
    assert set(attempts) == {1, 2, 3}


def test_bits_of_an_image_do_not_depend_on_how_many_others_are_drawn_anew(model):
    sampling = replace(tiny_config().sampling, guidance_scale=0.0, attempts=3)
    labels = [0, 1, 2] * 4
    some, others = (
        draw_pixels(model, labels, [*range(start, start + 9), 7, 7, 7], sampling, 0, CPU) for start in (10, 50)
    )
    assert torch.equal(some[9:], others[9:])
    assert not torch.isclose(some[:9], others[:9]).all()


def test_attempts_at_prompts_are_refused(model):
    several = replace(tiny_config().sampling, attempts=2)
    with pytest.raises(InputError, match=r"sampling\.attempts=2: must be 1: this base draws prompts, not classes"):
        steps_and_guidance(several, FAMILIES["StableDiffusionPipeline"])


def test_scale_1_makes_no_null_pass_and_needs_no_null_row(model):
    seen = []
    hook = model.denoiser.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    bare = replace(model, class_embedding=model.class_embedding[:-1], info={**model.info, "null_row": False})
    sampling = replace(tiny_config().sampling, guidance_scale=1.0)
    draw(bare, [0, 1], [0, 0], sampling, 0, CPU)
    draw(model, [0, 1], [0, 0], replace(sampling, guidance_scale=2.0), 0, CPU)
    hook.remove()
    assert seen == [2] * 4 + [4] * 4


def test_a_base_without_a_null_row_refuses_guidance(model):
    bare = replace(model, class_embedding=model.class_embedding[:-1], info={**model.info, "null_row": False})
    with pytest.raises(InputError, match=r"guidance_scale=3.*null row.*guidance_scale=1"):
        draw(bare, [0], [0], tiny_config().sampling, 0, CPU)


def test_broken_weights_are_refused_and_give_no_picture(model):
    broken = replace(model, class_embedding=model.class_embedding * float("nan"))
    with pytest.raises(InputError, match="NaN or infinite latents"):
        draw(broken, [0], [0], tiny_config().sampling, 0, CPU)


def test_drawing_leaves_the_caller_s_random_state_and_scheduler_alone(model):
    state = torch.random.get_rng_state()
    before = model.scheduler.timesteps.clone()
    draw(model, [0], [0], tiny_config("sampling.eta=1.0").sampling, 0, CPU)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(before, model.scheduler.timesteps)


@pytest.mark.parametrize("steps", [5, 50, 200])
def test_timesteps_are_those_of_latent_diffusion_where_steps_divide_1000(steps):
    scheduler = DDIMScheduler.from_config(tiny_model(tiny_config()).scheduler.config)
    assert timesteps(scheduler, steps) == [1 + i * (1000 // steps) for i in reversed(range(steps))]


@pytest.mark.parametrize("steps", [600, 350, 1000, 1001])
def test_a_chain_that_would_begin_far_below_pure_noise_is_refused(steps, model):
    with pytest.raises(InputError, match=f"sampling.steps={steps}"):
        timesteps(DDIMScheduler.from_config(model.scheduler.config), steps)


def test_exactly_n_images_with_one_more_for_the_first_classes():
    assert balanced(["x", "y", "z"], 5) == [("x", 0), ("x", 1), ("y", 0), ("y", 1), ("z", 0)]


def test_a_folder_of_samples_holds_the_same_images_in_every_form(model, tmp_path):
    config = tiny_config()
    facts = {"base": "0" * 64, "privacy": {"epsilon": 1.0}}
    sample(model, config, CLASSES, 8, tmp_path / "work", tmp_path / "out", Events(), facts)
    dataset = read_dataset(tmp_path / "out", CLASSES, SPLIT)
    images = dataset.images(slice(None))
    assert images.shape == (8, 16, 16, 1)
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    with np.load(tmp_path / "out" / "samples.npz", allow_pickle=False) as archive:
        assert archive["arr_0"].dtype == np.uint8
        assert np.array_equal(archive["arr_0"], np.repeat(images, 3, axis=3))
        assert np.array_equal(archive["arr_1"], dataset.labels)
    first = draw(model, [0, 0, 0], [0, 1, 2], config.sampling, 0, CPU)
    assert np.array_equal(images[:3], first)
    written = json.loads((tmp_path / "out" / "samples.json").read_text())
    expected = {"seed": 0, "n": 8, "steps": 4, "eta": 1.0, "guidance_scale": 3.0, "model": model_fingerprint(model)}
    assert written | expected | facts == written
    assert (tmp_path / "out" / "grid.png").exists()
    assert not list((tmp_path / "work").iterdir())


def test_no_picture_of_a_folder_is_made_durable_twice_and_of_many_none_by_itself(model, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "PACKED_UP_TO", 8)
    synced: list[str] = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda number: (synced.append(os.readlink(f"/proc/self/fd/{number}")), real(number))
    )
    sample(model, tiny_config(), CLASSES, 8, tmp_path / "work", tmp_path / "few", Events())
    pictures = [path for path in synced if "/images/" in path]
    assert len(pictures) == len(list((tmp_path / "few" / "images").iterdir())) == 8
    monkeypatch.setattr(files, "SYNCED_BY_ONE", 7)
    synced.clear()
    at_once: list[None] = []
    monkeypatch.setattr(os, "sync", lambda: at_once.append(None))
    sample(model, tiny_config(), CLASSES, 8, tmp_path / "work", tmp_path / "many", Events())
    assert not [path for path in synced if "/images/" in path]
    assert len(at_once) == 1
    assert contents(tmp_path / "many") == contents(tmp_path / "few")


def test_a_subset_of_the_classes_gets_the_images_that_it_has_among_all(model, tmp_path):
    config = tiny_config("sampling.batch_size=2")
    sample(model, config, CLASSES, 6, tmp_path / "work", tmp_path / "all", Events())
    sample(model, config, ["c"], 2, tmp_path / "work", tmp_path / "one", Events())
    whole = read_dataset(tmp_path / "all", CLASSES, SPLIT)
    one = read_dataset(tmp_path / "one", ["c"], SPLIT)
    assert np.array_equal(whole.images(slice(4, 6)), one.images(slice(None)))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def kill_in_batch(number, calls):
    """Replace `draw` by one that is killed in batch `number`; `calls` counts its calls."""

    def killed_once(*arguments):
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return draw(*arguments)

    return killed_once


def test_a_killed_sampling_goes_on_where_it_was_and_ends_in_the_same_bytes(model, tmp_path, monkeypatch):
    config = tiny_config("sampling.eta=0.5")
    sample(model, config, CLASSES, 8, tmp_path / "work0", tmp_path / "whole", Events())
    calls: list[int] = []
    monkeypatch.setattr(folder_module, "draw", kill_in_batch(3, calls))
    with pytest.raises(KeyboardInterrupt):
        sample(model, config, CLASSES, 8, tmp_path / "work", tmp_path / "resumed", Events())
    assert not (tmp_path / "resumed").exists()
    heard = Heard()
    began = time.monotonic()
    sample(model, config, CLASSES, 8, tmp_path / "work", tmp_path / "resumed", heard)
    assert len(calls) == 4  # two batches, the killed one, and that one again
    ((name, speed, _),) = heard.metrics
    assert name == "images_per_second"
    assert speed > 2 / (time.monotonic() - began)  # the speed counts the two images drawn now
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("change", ["experiment.seed=1", "sampling.guidance_scale=2.0", "sampling.attempts=2"])
def test_parts_of_other_settings_are_never_mixed_in(model, tmp_path, monkeypatch, change):
    first, other = tiny_config(), tiny_config(change)
    sample(model, other, CLASSES, 8, tmp_path / "work", tmp_path / "expected", Events())
    monkeypatch.setattr(folder_module, "draw", kill_in_batch(3, []))
    with pytest.raises(KeyboardInterrupt):
        sample(model, first, CLASSES, 8, tmp_path / "work", tmp_path / "out", Events())
    sample(model, other, CLASSES, 8, tmp_path / "work", tmp_path / "out", Events())
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_parts_of_other_code_are_never_mixed_in(model, tmp_path, monkeypatch):
    calls: list[int] = []
    monkeypatch.setattr(folder_module, "draw", kill_in_batch(3, calls))
    with pytest.raises(KeyboardInterrupt):
        sample(model, tiny_config(), CLASSES, 8, tmp_path / "work", tmp_path / "out", Events())
    monkeypatch.setattr(folder_module, "digest_code", lambda *rooms: f"changed {rooms}")
    sample(model, tiny_config(), CLASSES, 8, tmp_path / "work", tmp_path / "out", Events())
    assert len(calls) == 3 + 3


def test_a_folder_names_the_precision_that_auto_came_to_and_is_never_mixed_of_two(model, tmp_path, monkeypatch):
    exact, picked = tiny_config("sampling.precision=float32"), tiny_config("sampling.precision=auto")
    sample(model, picked, CLASSES, 8, tmp_path / "work", tmp_path / "picked", Events())
    assert json.loads((tmp_path / "picked" / "samples.json").read_text())["precision"] == "float32"
    sample(model, exact, CLASSES, 8, tmp_path / "work", tmp_path / "exact", Events())
    assert contents(tmp_path / "picked") == contents(tmp_path / "exact")
    monkeypatch.setattr(folder_module, "draw", kill_in_batch(3, []))
    with pytest.raises(KeyboardInterrupt):
        sample(model, picked, CLASSES, 8, tmp_path / "work", tmp_path / "out", Events())
    rough = tiny_config("sampling.precision=bfloat16")
    sample(model, rough, CLASSES, 8, tmp_path / "work", tmp_path / "rough", Events())
    assert json.loads((tmp_path / "rough" / "samples.json").read_text())["precision"] == "bfloat16"
    assert contents(tmp_path / "rough") != contents(tmp_path / "exact")
    assert len(list((tmp_path / "work").iterdir())) == 1  # the images of the killed call


def test_another_adapter_is_another_model(model):
    changed = replace(model, class_embedding=model.class_embedding + 1e-6)
    assert model_fingerprint(changed) != model_fingerprint(model)
    assert model_fingerprint(tiny_model(tiny_config())) == model_fingerprint(model)


def test_a_class_that_the_model_does_not_know_is_refused_by_name(model, tmp_path):
    with pytest.raises(InputError, match="class 'q'"):
        sample(model, tiny_config(), ["a", "q"], 4, tmp_path / "work", tmp_path / "out", Events())


def test_a_saved_model_draws_the_same_images(model, tmp_path):
    save_model(tmp_path / "m", model.denoiser, model.vae, model.scheduler, model.class_embedding, model.info)
    read = load_model(tmp_path / "m")
    sampling = tiny_config().sampling
    assert np.array_equal(draw(model, [1], [0], sampling, 0, CPU), draw(read, [1], [0], sampling, 0, CPU))


def test_a_grid_shows_every_image_in_its_row_enlarged_without_blur(tmp_path):
    rows = [np.full((n, 16, 16, 1), value, np.uint8) for n, value in ((3, 10), (2, 200))]
    rows[0][:, :8] = 90
    write_grid(tmp_path / "grid.png", rows, ["a", "longer"])
    with Image.open(tmp_path / "grid.png") as picture:
        values = np.asarray(picture)[..., 0]
    step = CELL + GAP
    right = values[:, -3 * step :]  # the pictures, without the names
    cells = right[GAP : GAP + 2 * step].reshape(2, step, 3, step)[:, :CELL, :, :CELL].transpose(0, 2, 1, 3)
    assert (cells[0, :, : CELL // 2] == 90).all()
    assert (cells[0, :, CELL // 2 :] == 10).all()
    assert (cells[1, :2] == 200).all()
    assert (cells[1, 2] == 255).all()
    assert (values[:, : -3 * step] < 100).any()  # the names


def test_a_grid_of_a_thousand_classes_stays_readable():
    picture = draw_grid([np.zeros((1, 8, 8, 3), np.uint8)] * 1000, [str(i) for i in range(1000)])
    assert picture.height < 3000
