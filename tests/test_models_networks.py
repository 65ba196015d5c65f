import json
from dataclasses import replace

import pytest
import torch

from dp_lora.config import load
from dp_lora.errors import InputError
from dp_lora.models.autoencoder import build_autoencoder, decode, encode, latent_size
from dp_lora.models.device import pick_device
from dp_lora.models.unet import build_unet
from tests.support.golden import golden_json

CONFIG = load("mnist5k")
LDM = replace(
    CONFIG.ldm,
    block_out_channels=[64, 128],
    layers_per_block=1,
    attention=[False, True],
    attention_head_width=32,
    cross_attention_dim=64,
    norm_num_groups=32,
)
# constructor arguments of a UNet that gives the original code's outputs
ARGUMENTS = golden_json("cin256-tiny/diffusers-arguments.json")


def test_a_unet_with_attention_at_its_lower_resolution_attends_there_and_in_the_middle():
    unet = build_unet(LDM, 3, 8)
    assert sum(p.numel() for p in unet.parameters()) == 3_917_379
    places = {name.split(".transformer_blocks")[0].rsplit(".attentions", 1)[0] for name in unet.attn_processors}
    assert places == {"down_blocks.1", "mid_block", "up_blocks.0"}


def test_heads_have_the_configured_width():
    ldm = replace(LDM, block_out_channels=[64, 96], attention=[True, True], attention_head_width=16)
    unet = build_unet(ldm, 3, 8)
    heads = {name: module.heads for name, module in unet.named_modules() if name.endswith("attn1")}
    widths = {name: module.to_q.out_features for name, module in unet.named_modules() if name.endswith("attn1")}
    assert {widths[name] // heads[name] for name in heads} == {16}
    assert {heads[name] for name in heads} == {4, 6}


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        (ARGUMENTS["unet"], {"block_out_channels": [8, 16, 32], "attention_head_width": 4, "norm_num_groups": 4}),
        (ARGUMENTS["real_width"]["unet"], {"block_out_channels": [256, 512, 1024]}),
    ],
)
def test_the_unet_of_cin256_gets_the_arguments_that_reproduce_latent_diffusion(arguments, size):
    dim = arguments["cross_attention_dim"]
    ldm = replace(LDM, attention=[True] * 3, layers_per_block=2, cross_attention_dim=dim, **size)
    with torch.device("meta"):
        unet = build_unet(ldm, 4, arguments["sample_size"])
    found = {key: value for key, value in dict(unet.config).items() if key in arguments}
    assert json.loads(json.dumps(found)) == {"norm_num_groups": 32} | arguments
    if arguments["sample_size"] == 32:
        assert sum(p.numel() for p in unet.parameters()) == 394_984_196


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"norm_num_groups": 24}, "ldm.norm_num_groups=24"),
        ({"attention_head_width": 48}, "ldm.attention_head_width=48"),
        ({"block_out_channels": [32, 32, 64, 64, 64], "attention": [False] * 5}, "ldm.block_out_channels"),
    ],
)
def test_a_unet_that_does_not_fit_is_refused_by_key(change, key):
    with pytest.raises(InputError, match=key):
        build_unet(replace(LDM, **change), 3, 8)


def test_an_autoencoder_that_does_not_fit_is_refused_by_key():
    with pytest.raises(InputError, match=r"autoencoder\.norm_num_groups=5"):
        build_autoencoder(replace(CONFIG.autoencoder, norm_num_groups=5), 1, 32)
    with pytest.raises(InputError, match=r"autoencoder\.block_out_channels"):
        build_autoencoder(replace(CONFIG.autoencoder, block_out_channels=[8] * 5), 1, 8)


def test_latents_are_normalised_and_decoded_from_the_same_scale():
    torch.manual_seed(0)
    settings = replace(CONFIG.autoencoder, block_out_channels=[8, 16])
    vae = build_autoencoder(settings, 1, 16).eval()
    pixels = torch.rand(6, 1, 16, 16) * 2 - 1
    with torch.no_grad():
        raw = vae.encode(pixels).latent_dist.mean
        plain = decode(vae, encode(vae, pixels))
        mean, std = raw.mean(dim=(0, 2, 3)), raw.std(dim=(0, 2, 3))
        vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
        latents = encode(vae, pixels)
        assert latents.shape == (6, 3, latent_size(vae), latent_size(vae))
        torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(decode(vae, latents), plain, atol=1e-5, rtol=0)


def test_decoded_pixels_stay_in_range():
    torch.manual_seed(0)
    vae = build_autoencoder(replace(CONFIG.autoencoder, block_out_channels=[8, 16]), 1, 16)
    pixels = decode(vae, 1000 * torch.randn(2, 3, 8, 8))
    assert pixels.abs().max() == 1


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(InputError, match=r"compute\.device=cuda"):
        pick_device("cuda")
