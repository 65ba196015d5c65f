"""The rules account for every tensor in the original's key lists; extra and missing tensors are named."""

from dataclasses import replace

import pytest
import torch

from dp_lora.errors import InputError
from dp_lora.models.agreement import check_agreement
from dp_lora.models.autoencoder import latent_size
from dp_lora.models.importing import read_state_dict
from dp_lora.models.importing.keys import CLASS_EMBEDDING, HARMLESS, ema_key, first_stage_keys, unet_keys
from dp_lora.models.importing.model import check_finite, import_networks, import_scheduler
from tests.support.golden import NAMES, checkpoint, golden_config, golden_json, meta_state, real_config


@pytest.fixture(scope="module", params=NAMES)
def named(request):
    """A tiny model's name, config and state dict; a test that changes the dict must copy it first."""
    return request.param, golden_config(request.param), read_state_dict(checkpoint(request.param))


def message_of(call) -> str:
    with pytest.raises(InputError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_the_rules_give_the_key_map_and_the_real_width_imports_without_memory(name):
    config = real_config(name)
    state = meta_state(name)
    networks = import_networks(state, config)
    key_map = golden_json(f"{name}-tiny/diffusers-key-map.json")
    for names, part in ((unet_keys(networks.unet), "unet"), (first_stage_keys(networks.vae), "first_stage")):
        assert {key: ours for ours, key in names.items()} == key_map[part]
    counts = golden_json("parameter-counts.json")[{"emnist": "emnist32-conditional"}.get(name, name)]
    assert sum(p.numel() for p in networks.unet.parameters()) == counts["unet"]
    assert sum(p.numel() for p in networks.vae.parameters()) == counts["first_stage"]
    assert networks.class_embedding.numel() == counts["class_embedder"]
    assert all(p.device.type == "meta" for network in networks[:2] for p in network.parameters())
    assert networks.unet.config["sample_size"] == latent_size(networks.vae)


@pytest.mark.parametrize("name", NAMES)
def test_the_moving_average_has_a_name_for_every_tensor_of_the_unet(name):
    keys = golden_json(f"{name}-keys.json")["keys"]
    unet = [key for key in keys if key.startswith("model.diffusion_model.")]
    ema = {key for key in keys if key.startswith("model_ema.") and not HARMLESS.fullmatch(key)}
    assert {ema_key(key) for key in unet} == ema


def test_what_is_missing_left_over_or_of_another_shape_is_listed_by_key(named):
    _, config, state = named
    changed = dict(state)
    del changed["model.diffusion_model.out.2.bias"]
    del changed["betas"]
    changed["first_stage_model.encoder.mid.attn_2.q.weight"] = torch.zeros(1)
    changed["first_stage_model.quant_conv.bias"] = torch.zeros(99)
    message = message_of(lambda: import_networks(changed, config))
    assert "2 missing: model.diffusion_model.out.2.bias, betas" in message
    assert "1 left over: first_stage_model.encoder.mid.attn_2.q.weight" in message
    assert "1 of another shape: first_stage_model.quant_conv.bias (99,), not (" in message


def test_half_a_moving_average_is_refused_and_none_is_not(named):
    _, config, state = named
    ema = [key for key in state if key.startswith("model_ema.")]
    without = {key: value for key, value in state.items() if key not in ema}
    import_networks(without, config)
    wanted = replace(config, checkpoint=replace(config.checkpoint, ema=True))
    assert "checkpoint.ema=true, but it holds no moving averages" in message_of(
        lambda: import_networks(without, wanted)
    )
    half = {key: value for key, value in state.items() if key not in ema[10:20]}
    message = message_of(lambda: import_networks(half, config))
    assert "10 missing" in message
    assert ema[10] in message


def test_only_extras_known_to_be_harmless_are_left_aside(named):
    _, config, state = named
    known = ["ddim_sigmas", "ddim_alphas", "ddim_alphas_prev", "ddim_sqrt_one_minus_alphas", "logvar"]
    known += ["first_stage_model.loss.perceptual_loss.lin0.model.1.weight", "model_ema.num_updates"]
    with_known = dict(state) | {key: torch.full((3,), torch.nan) for key in known}
    import_networks(with_known, config)
    check_finite(with_known)
    foreign = ["scale_factor", "ddim_sigmas2", "cond_stage_model.embedding.bias", "first_stage_model.lossy"]
    with_foreign = with_known | {key: torch.zeros(1) for key in foreign}
    assert f"4 left over: {', '.join(foreign)};" in message_of(lambda: import_networks(with_foreign, config))


def test_half_precision_weights_become_float32_and_whole_numbers_are_refused(named):
    _, config, state = named
    key = "first_stage_model.decoder.conv_out.weight"
    networks = import_networks(dict(state) | {key: state[key].half()}, config)
    assert {p.dtype for p in networks.vae.parameters()} == {torch.float32}
    assert torch.equal(networks.vae.decoder.conv_out.weight, state[key].half().float())
    assert key in message_of(lambda: import_networks(dict(state) | {key: state[key].int()}, config))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinite_weights_are_named(named, value):
    _, _, state = named
    key = "model.diffusion_model.middle_block.1.proj_in.weight"
    broken = state[key].clone()
    broken.view(-1)[-1] = value
    assert f"{key} holds NaN" in message_of(lambda: check_finite(dict(state) | {key: broken}))
    check_finite(state)


def test_a_schedule_that_contradicts_the_checkpoint_is_refused_with_the_one_that_does_not(named):
    name, config, state = named
    end = {"cin256": 0.0195, "emnist": 0.0155}[name]
    import_scheduler(state, config.ldm)
    for wrong in ({"beta_schedule": "cosine"}, {"beta_end": 0.017}, {"beta_start": 0.002}):
        message = message_of(lambda wrong=wrong: import_scheduler(state, replace(config.ldm, **wrong)))
        assert message.startswith("ldm.beta_schedule=")
        assert f"set ldm.beta_schedule=linear ldm.beta_start=0.0015 ldm.beta_end={end}" in message
    shorter = dict(state) | {"betas": state["betas"][:500]}
    assert "must be (1000,)" in message_of(lambda: import_scheduler(shorter, config.ldm))
    other = dict(state) | {"alphas_cumprod": state["alphas_cumprod"] ** 2}
    assert "alphas_cumprod" in message_of(lambda: import_scheduler(other, config.ldm))


def test_a_config_of_another_structure_is_refused(named):
    name, config, state = named
    other = golden_config("emnist" if name == "cin256" else "cin256")
    assert "use the config that belongs to this checkpoint" in message_of(lambda: import_networks(state, other))
    ldm = replace(config.ldm, cross_attention_dim=7)
    assert "of another shape" in message_of(lambda: import_networks(state, replace(config, ldm=ldm)))
    thin = dict(state) | {CLASS_EMBEDDING: state[CLASS_EMBEDDING][:, :3]}
    assert "ldm.cross_attention_dim=" in message_of(lambda: import_networks(thin, config))


def test_a_fine_tuning_config_that_contradicts_its_base_is_refused(named):
    """The released configurations do contradict theirs: a cosine schedule, and 4 heads for a UNet trained with 2."""
    name, config, state = named
    networks, scheduler = import_networks(state, config), import_scheduler(state, config.ldm)

    def message(**wrong) -> str:
        return message_of(lambda: check_agreement(replace(config.ldm, **wrong), networks.unet, scheduler, "the base's"))

    check_agreement(config.ldm, networks.unet, scheduler, "the base's")
    assert "contradicts the base's own betas" in message(beta_schedule="cosine")
    assert "ldm.prediction_type=v_prediction" in message(prediction_type="v_prediction")
    if name == "emnist":
        assert "ldm.attention_heads=4: gives [4, 4] attention heads" in message(attention_heads=4)
        assert "are [2, 2]" in message(attention_heads=None, attention_head_width=4)
        check_agreement(
            replace(config.ldm, attention_heads=None, attention_head_width=8, block_out_channels=[16, 16]),
            networks.unet,
            scheduler,
            "the base's",
        )
    else:
        assert "ldm.attention_head_width=8: gives [1, 2, 4] attention heads" in message(attention_head_width=8)
