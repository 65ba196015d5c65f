"""Imported models give the original implementation's own numbers, after a round trip through a model folder."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dp_lora.diffusion import diffuse, loss_per_row
from dp_lora.models.autoencoder import build_autoencoder, decode, encode
from dp_lora.models.folder import Model, load_model, save_model
from dp_lora.models.importing import import_model
from dp_lora.models.resampling import ResidualResampler, ResidualUNet2DConditionModel
from dp_lora.models.unet import build_unet
from dp_lora.sampling import ddim, draw_pixels
from tests.support.golden import NAMES, arrays, checkpoint, golden_config, golden_json

CPU = torch.device("cpu")
# tolerances against the golden data: larger than rounding, smaller than the error of a wrong norm_eps
UNET, AUTOENCODER, LOSS, DDIM = 1e-5, 3e-5, 2e-6, 5e-6
SCHEDULES = {"cin256": "linear_cin", "emnist": "linear_emnist"}
GOLDEN_SCHEDULES = np.load(Path(__file__).parent / "data" / "schedules.npz")

_models: dict[tuple[str, bool], Model] = {}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    yield tmp_path_factory.mktemp("imported")
    _models.clear()


def imported(folders: Path, name: str, ema: bool = False) -> Model:
    """A tiny model, imported, saved and loaded again, once."""
    if (name, ema) not in _models:
        folder = folders / f"{name}-{ema}"
        model = import_model(checkpoint(name), golden_config(name, f"checkpoint.ema={str(ema).lower()}"), "0" * 64)
        save_model(folder, model.denoiser, model.vae, model.scheduler, model.class_embedding, model.info)
        _models[name, ema] = load_model(folder)
    return _models[name, ema]


def close(found, expected, atol):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def predict(model: Model, name: str, context: str = "unet_context") -> torch.Tensor:
    io = arrays(name)
    with torch.no_grad():
        return model.denoiser(io["unet_x"], io["unet_t"], encoder_hidden_states=io[context]).sample


@pytest.mark.parametrize("name", NAMES)
def test_the_unet_gives_the_original_s_noise_with_one_token_and_with_three(folders, name):
    model = imported(folders, name)
    close(predict(model, name), arrays(name)["unet_eps"], UNET)
    close(predict(model, name, "unet_context3"), arrays(name)["unet_eps_context3"], UNET)


@pytest.mark.parametrize("name", NAMES)
def test_the_moving_averages_are_taken_where_the_config_says_so(folders, name):
    model = imported(folders, name, ema=True)
    close(predict(model, name), arrays(name)["unet_eps_ema"], UNET)
    assert (predict(model, name) - arrays(name)["unet_eps"]).abs().max() > 100 * UNET
    assert model.info["trained_on"]["ema"] is True


@pytest.mark.parametrize("name", NAMES)
def test_the_class_embedding_is_the_original_s_to_the_bit(folders, name):
    model = imported(folders, name)
    assert torch.equal(model.class_embedding[arrays(name)["class_id"]].unsqueeze(1), arrays(name)["class_embedding"])
    assert model.null_row is None


def test_the_vq_autoencoder_encodes_to_before_quantisation_and_decodes_through_it(folders):
    vae, io = imported(folders, "cin256").vae, arrays("cin256")
    with torch.no_grad():
        close(encode(vae, io["vq_image"]), io["vq_latent_prequant"], AUTOENCODER)
        code, _, (_, _, index) = vae.quantize(io["vq_decode_in"])
        assert torch.equal(index.view(2, 8, 8), io["vq_code_index"])
        close(code, io["vq_code"], AUTOENCODER)
        close(vae.decode(io["vq_decode_in"]).sample, io["vq_decode_quantized"], AUTOENCODER)
        close(decode(vae, io["vq_decode_in"]), io["vq_decode_quantized"].clamp(-1, 1), AUTOENCODER)
        plain = vae.decode(io["vq_decode_in"], force_not_quantize=True).sample
        close(plain, io["vq_decode_not_quantized"], AUTOENCODER)
    assert (io["vq_decode_quantized"].clamp(-1, 1) - plain.clamp(-1, 1)).abs().max() > 0.01


def test_the_kl_autoencoder_gives_the_original_s_posterior_and_pictures(folders):
    vae, io = imported(folders, "emnist").vae, arrays("emnist")
    with torch.no_grad():
        posterior = vae.encode(io["kl_image"]).latent_dist
        close(posterior.mean, io["kl_mean"], AUTOENCODER)
        close(posterior.logvar, io["kl_logvar"], AUTOENCODER)
        close(encode(vae, io["kl_image"]), io["kl_mean"], AUTOENCODER)
        close(vae.decode(io["kl_sample"]).sample, io["kl_decode"], AUTOENCODER)
        close(decode(vae, io["kl_sample"]), io["kl_decode"].clamp(-1, 1), AUTOENCODER)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_of_each_row_is_the_original_s(folders, name):
    model, io = imported(folders, name), arrays(name)
    noisy = diffuse(io["loss_x0"], io["loss_noise"], model.scheduler.alphas_cumprod, io["loss_t"])
    close(noisy, io["loss_x_noisy"], 2e-6)
    with torch.no_grad():
        context = model.class_embedding[io["loss_class_id"]].unsqueeze(1)
        prediction = model.denoiser(noisy, io["loss_t"], encoder_hidden_states=context).sample
    close(prediction, io["loss_eps"], UNET)
    close(loss_per_row(prediction, io["loss_noise"]), io["loss_mse_per_sample"], LOSS)


@pytest.mark.parametrize("name", NAMES)
def test_the_scheduler_has_the_checkpoint_s_own_schedule(folders, name):
    scheduler = imported(folders, name).scheduler
    assert scheduler.config["trained_betas"] is not None
    golden = {key: GOLDEN_SCHEDULES[f"{SCHEDULES[name]}_{key}"] for key in ("betas", "alphas_cumprod")}
    np.testing.assert_allclose(scheduler.betas.numpy(), golden["betas"], atol=3e-8)
    np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), golden["alphas_cumprod"], atol=1e-6)


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_our_sampler_walks_the_original_s_ddim_trajectory(folders, name, scale, monkeypatch):
    model, io = imported(folders, name), arrays(name)
    labels = io["ddim_class_id"].tolist()
    (null,) = set(io["ddim_uncond_class_id"].tolist())
    model = replace(
        model,
        class_embedding=torch.cat([model.class_embedding, model.class_embedding[null][None]]),
        info={**model.info, "null_row": True},
    )
    walked: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    step = ddim.DDIMScheduler.step

    def recording(self, prediction, t, *arguments, **options):
        result = step(self, prediction, t, *arguments, **options)
        walked.append((int(t), *result[:2]))
        return result

    monkeypatch.setattr(ddim.DDIMScheduler, "step", recording)
    monkeypatch.setattr(ddim, "next_noise", lambda *_: io["ddim_x_T"])
    sampling = replace(golden_config(name).sampling, steps=5, eta=0.0, guidance_scale=float(scale))
    pixels = draw_pixels(model, labels, [0, 1], sampling, 0, CPU)
    assert pixels.shape == (2, 3, model.info["size"], model.info["size"])
    assert [t for t, _, _ in walked] == io["ddim5_timesteps"].tolist()
    for kind, place in (("x", 1), ("pred_x0", 2)):
        expected = io[f"ddim5_scale{scale}_{kind}"]
        close(torch.stack([entry[place] for entry in walked]), expected[1:], DDIM * float(expected.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_the_builders_give_the_arguments_that_reproduce_latent_diffusion(name):
    arguments = golden_json(f"{name}-tiny/diffusers-arguments.json")
    config = golden_config(name)
    with torch.device("meta"):
        vae = build_autoencoder(config.autoencoder, config.public.channels, config.public.size)
        unet = build_unet(config.ldm, config.autoencoder.latent_channels, arguments["unet"]["sample_size"])
    for network, wanted in ((unet, arguments["unet"]), (vae, arguments["first_stage"])):
        found = {key: network.config[key] for key in wanted}
        assert {key: list(v) if isinstance(v, tuple) else v for key, v in found.items()} == wanted


def test_another_number_of_heads_loads_and_gives_another_function(folders):
    """This is why heads are checked against the base: no tensor's shape shows them."""
    model = import_model(checkpoint("emnist"), golden_config("emnist", "ldm.attention_heads=4"), "0" * 64)
    found = predict(model, "emnist")
    close(found, arrays("emnist")["unet_eps_num_heads4"], UNET)
    assert (found - arrays("emnist")["unet_eps"]).abs().max() > 0.2


def test_residual_resamplers_are_handed_the_time_embedding_by_their_block_in_a_copy_too(folders):
    unet = imported(folders, "emnist").denoiser
    assert isinstance(unet, ResidualUNet2DConditionModel)
    resamplers = [module for module in unet.modules() if isinstance(module, ResidualResampler)]
    assert len(resamplers) == 2
    assert all(module.time_embedding is None for module in resamplers)
    with pytest.raises(RuntimeError, match="its own block"):
        resamplers[0](torch.zeros(1, 16, 4, 4))
    twin = copy.deepcopy(unet)
    io = arrays("emnist")
    with torch.no_grad():
        found = twin(io["unet_x"], io["unet_t"], encoder_hidden_states=io["unet_context"]).sample
    close(found, io["unet_eps"], UNET)
