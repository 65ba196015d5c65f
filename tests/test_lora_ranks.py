"""Ranks that fall with depth are those of the study, have scaling 1, and survive every way to save and load."""

import json

import pytest
import torch
from safetensors.torch import load_file

from dp_lora.config import load
from dp_lora.errors import InputError
from dp_lora.models.adapters import WEIGHTS, Adapter, add_lora, apply_adapter, lora_parameters
from dp_lora.models.counting import count_parameters
from dp_lora.models.folder import load_model
from dp_lora.models.meta import tensor_shapes
from dp_lora.models.ranks import in_order_of_depth, layer_ranks
from dp_lora.models.shapes import base_shapes
from dp_lora.models.targets import matched_modules
from dp_lora.privacy.gradients import micro_batches, part_gradients
from dp_lora.privacy.randomness import ItemStreams
from dp_lora.training.private_loss import diffusion_loss
from tests.support.golden import golden_json
from tests.support.tiny import (
    TINY,
    difference,
    differences_in_a_fresh_process,
    lora_settings,
    make_base,
    saved_adapter,
    tiny_config,
    tiny_inputs,
    tiny_latents,
    tiny_model,
    total_norm,
)

COUNTS = golden_json("parameter-counts.json")
CPU = torch.device("cpu")


@pytest.mark.parametrize("model", ["cin256", "emnist32-conditional"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ranks_fall_from_16_to_4_as_the_study_lists_them(model, schedule):
    expected = COUNTS[model]["lora"][f"layer-wise {schedule} 16 to 4"]
    assert layer_ranks(expected["modules"], schedule, 16, 4) == expected["ranks"]


def test_a_constant_rank_and_a_single_layer_need_no_last_rank():
    assert layer_ranks(3, "constant", 8, None) == [8, 8, 8]
    assert layer_ranks(1, "linear", 16, 4) == [16]
    assert layer_ranks(3, "cosine", 2, 8) == [2, 5, 8]
    for schedule, part in (("linear", "rank_last"), ("steep", "one of")):
        with pytest.raises(InputError, match=part):
            layer_ranks(3, schedule, 8, None)


def test_depth_runs_down_then_the_middle_then_up(tmp_path):
    names = matched_modules(tensor_shapes(tiny_model(tmp_path).denoiser), "study")
    blocks = [name.split(".")[0] for name in names]
    assert blocks == sorted(blocks, key=["down_blocks", "mid_block", "up_blocks"].index)
    assert set(blocks) == {"down_blocks", "mid_block", "up_blocks"}
    assert (
        in_order_of_depth(["up_blocks.0.a", "time_embedding.linear_1", "mid_block.a"])[0] == "time_embedding.linear_1"
    )


def adapter_of(model, schedule: str = "linear") -> Adapter:
    """An adapter with ranks 6 to 2; A and B are not zero."""
    generator = torch.Generator().manual_seed(3)
    lora = add_lora(
        model.denoiser, lora_settings(rank=6, targets="study", rank_schedule=schedule, rank_last=2), generator
    )
    for name, parameter in model.denoiser.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return Adapter(model.denoiser, lora, torch.randn(2, 6, generator=generator).requires_grad_())


def test_every_layer_has_its_rank_in_both_factors_and_scaling_1(tmp_path):
    model = tiny_model(tmp_path)
    adapter_of(model)
    names = matched_modules(tensor_shapes(load_model(tmp_path / "base").denoiser), "study")
    ranks = dict(zip(names, layer_ranks(len(names), "linear", 6, 2), strict=True))
    assert len(set(ranks.values())) == 5
    parameters = lora_parameters(model.denoiser, "AB")
    for name, rank in ranks.items():
        assert parameters[f"{name}.lora_A"].shape[0] == parameters[f"{name}.lora_B"].shape[1] == rank
        assert model.denoiser.get_submodule(name).scaling == {"default": 1.0}


@pytest.mark.slow
def test_an_adapter_of_falling_ranks_reloads_in_a_fresh_process_through_diffusers_and_peft(tmp_path):
    model = tiny_model(tmp_path)
    folder = saved_adapter(tmp_path / "adapter", adapter_of(model))
    x, t, context = tiny_inputs()
    expected = model.denoiser(x, t, context).sample.detach()
    ours = apply_adapter(load_model(tmp_path / "base"), folder)
    assert torch.equal(ours.denoiser(x, t, context).sample, expected)
    found = differences_in_a_fresh_process(tmp_path, folder, (x, t, context), expected)
    assert [value < 2e-6 for value in found] == [True, True]
    stored = json.loads((folder / "peft" / "adapter_config.json").read_text())
    assert stored["rank_pattern"] == stored["alpha_pattern"]
    assert stored["r"] == json.loads((folder / "model.json").read_text())["rank"] == 6


def test_a_mutant_without_the_alpha_pattern_computes_something_else(tmp_path):
    """An alpha that stays at the first rank would scale the deeper layers up."""
    model = tiny_model(tmp_path)
    folder = saved_adapter(tmp_path / "adapter", adapter_of(model))
    from diffusers import UNet2DConditionModel
    from peft import PeftModel

    path = folder / "peft" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "alpha_pattern": {}}))
    mutant = PeftModel.from_pretrained(
        UNet2DConditionModel.from_pretrained(tmp_path / "base" / "unet"), str(folder / "peft")
    )
    x, t, context = tiny_inputs()
    with torch.no_grad():
        assert (mutant(x, t, context).sample - model.denoiser(x, t, context).sample).abs().max() > 1e-3


def test_unit_gradients_of_falling_ranks_equal_autograd_unit_by_unit(tmp_path):
    config, model = tiny_config(), tiny_model(tmp_path)
    parameters = adapter_of(model, "cosine").parameters("AB")
    latents, labels = tiny_latents(3)

    def gradients(units):
        loss = diffusion_loss(config, model, latents, labels, CPU)(ItemStreams(11))
        (rows,) = micro_batches(units, 2, 6, CPU)
        return part_gradients(loss, parameters, rows)[0]

    together = gradients([[0], [1], [2]])
    for unit in range(3):
        alone = {name: value[0] for name, value in gradients([[unit]]).items()}
        ours = {name: value[unit] for name, value in together.items()}
        assert total_norm(difference(ours, alone)) < 1e-5 * total_norm(alone)


def test_falling_ranks_are_counted_as_they_are_made(tmp_path):
    config = load("mnist5k", {}, f"{TINY} lora.rank=6 lora.rank_schedule=linear lora.rank_last=2 lora.targets=study")
    make_base(tmp_path / "base", config)
    model = load_model(tmp_path / "base")
    adapter_of(model)
    counts = count_parameters(config, base_shapes(config, tmp_path / "base"))
    assert counts["lora"] == sum(parameter.numel() for parameter in lora_parameters(model.denoiser, "AB").values())
    assert counts["lora_ranks"][0] == 6
    assert counts["lora_ranks"][-1] == 2
    assert len(counts["lora_ranks"]) == len(counts["lora_modules"])


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ("lora.rank_schedule=linear", "lora.rank_last"),
        ("lora.rank_last=4", "lora.rank_last=4"),
        ("lora.rank_schedule=linear lora.rank_last=4 lora.alpha=8", "lora.alpha=8"),
        ("lora.rank_schedule=steep lora.rank_last=4", "one of constant, linear, cosine"),
        ("lora.rank_schedule=linear lora.rank_last=0", "from 1 to 1024"),
    ],
)
def test_a_schedule_that_says_half_of_what_it_needs_is_refused(overrides, part):
    with pytest.raises(InputError, match=part):
        load("mnist5k", {}, overrides)


def test_a_trained_adapter_keeps_its_ranks(tmp_path):
    model = tiny_model(tmp_path)
    folder = saved_adapter(tmp_path / "adapter", adapter_of(model))
    shapes = {name: value.shape for name, value in load_file(folder / WEIGHTS).items()}
    ranks = {shape[0] for name, shape in shapes.items() if "lora_A" in name}
    assert ranks == {2, 3, 4, 5, 6}
