"""LoRA adapts the right modules and trains the named parameters alone; its adapters load in diffusers and PEFT."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dp_lora.config import load
from dp_lora.errors import InputError
from dp_lora.files import read_json
from dp_lora.models.adapters import (
    EMBEDDING,
    WEIGHTS,
    UnitLinear,
    add_lora,
    apply_adapter,
    lora_parameters,
    untrained_class_embedding,
    with_embedding,
)
from dp_lora.models.counting import count_parameters
from dp_lora.models.embedding_start import start_positions
from dp_lora.models.folder import load_model
from dp_lora.models.info import UNETS, VAES
from dp_lora.models.meta import meta_networks, tensor_shapes
from dp_lora.models.shapes import base_shapes
from dp_lora.models.targets import is_linear, matched_modules
from tests.support.tiny import (
    differences_in_a_fresh_process,
    lora_settings,
    make_base,
    saved_adapter,
    tiny_adapter,
    tiny_config,
    tiny_inputs,
    tiny_model,
)


def test_the_default_targets_leave_out_what_gets_no_gradient_from_one_token(tmp_path):
    model = tiny_model(tmp_path)
    default = matched_modules(tensor_shapes(model.denoiser), "default")
    study = matched_modules(tensor_shapes(model.denoiser), "study")
    assert default
    assert all(not name.endswith(("attn2.to_q", "attn2.to_k")) for name in default)
    assert {name.rsplit("attn", 1)[1] for name in set(study) - set(default)} == {"2.to_q", "2.to_k"}


@pytest.mark.parametrize("targets", ["to_out.Linear", "attn1.to_q,attn9.to_q", "to_q,"])
def test_a_target_that_matches_nothing_is_an_error(tmp_path, targets):
    model = tiny_model(tmp_path)
    if targets == "to_q,":
        assert matched_modules(tensor_shapes(model.denoiser), targets)
        return
    with pytest.raises(InputError, match="matches no linear layer"):
        matched_modules(tensor_shapes(model.denoiser), targets)


def test_a_layer_that_sees_all_rows_as_one_list_is_refused_because_they_cannot_be_told_apart():
    layer = UnitLinear(3, 2, bias=False)
    layer.unit_weight = torch.ones(2, 2, 3), 4
    assert layer(torch.ones(4, 5, 3)).shape == (4, 5, 2)
    for listed in (torch.ones(20, 3), torch.ones(3)):
        with pytest.raises(InputError, match=r"for 4 rows, which cannot be told apart in it; leave its name out"):
            layer(listed)


def test_the_start_changes_nothing_and_depends_on_the_seed(tmp_path):
    model = tiny_model(tmp_path)
    x, t, context = tiny_inputs()
    before = model.denoiser(x, t, context).sample
    add_lora(model.denoiser, lora_settings(), torch.Generator().manual_seed(0))
    assert torch.equal(model.denoiser(x, t, context).sample, before)
    a = [p.clone() for n, p in lora_parameters(model.denoiser, "AB").items() if n.endswith("lora_A")]
    for seed, equal in ((0, True), (1, False)):
        other = load_model(tmp_path / "base")
        add_lora(other.denoiser, lora_settings(), torch.Generator().manual_seed(seed))
        b = [p for n, p in lora_parameters(other.denoiser, "AB").items() if n.endswith("lora_A")]
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True)) is equal


def test_the_adapter_reloads_in_a_fresh_process_through_diffusers_and_peft_with_difference_0(tmp_path):
    model = tiny_model(tmp_path)
    adapter = tiny_adapter(model)
    folder = saved_adapter(tmp_path / "adapter", adapter)
    x, t, context = tiny_inputs()
    expected = model.denoiser(x, t, context).sample.detach()
    # the loaders use stock attention, which rounds differently
    found = differences_in_a_fresh_process(tmp_path, folder, (x, t, context), expected)
    assert [value < 2e-6 for value in found] == [True, True]
    ours = apply_adapter(load_model(tmp_path / "base"), folder)
    assert torch.equal(ours.denoiser(x, t, context).sample, expected)
    assert ours.classes == ["x", "y"]
    assert torch.equal(ours.class_embedding[:2], adapter.embedding.detach())


def test_the_null_row_stays_the_base_s(tmp_path):
    model = tiny_model(tmp_path)
    other = with_embedding(model, torch.zeros(2, 6), ["x", "y"])
    assert torch.equal(other.null_row, model.null_row)
    assert other.class_embedding.shape == (3, 6)


def test_the_untrained_embedding_is_the_mean_of_the_base_plus_noise(tmp_path):
    model = tiny_model(tmp_path)
    mean = model.class_embedding[:3].mean(0)
    assert torch.allclose(untrained_class_embedding(model, "mean", 5, 0.0, 0), mean.expand(5, -1))
    a, b = (untrained_class_embedding(model, "mean", 5, 0.1, seed) for seed in (0, 1))
    assert not torch.equal(a, b)


def test_an_embedding_starts_from_the_classes_that_are_named(tmp_path):
    model = tiny_model(tmp_path)
    first, second = model.classes[:2]
    start = untrained_class_embedding(model, f"{second}, {first}", 2, 0.0, 0)
    assert torch.equal(start, model.class_embedding[[1, 0]])
    with pytest.raises(InputError, match=r"train\.embedding_start=nothing: 'nothing' is no class of the base"):
        untrained_class_embedding(model, "nothing", 1, 0.0, 0)
    with pytest.raises(InputError, match="1 names, 2 classes"):
        untrained_class_embedding(model, first, 2, 0.0, 0)


def test_an_embedding_started_at_zero_is_noise_alone(tmp_path):
    model = tiny_model(tmp_path)
    start = untrained_class_embedding(model, "zero", 5, 1.0, 0)
    offset = untrained_class_embedding(model, "mean", 5, 1.0, 0) - start
    assert torch.allclose(offset, model.class_embedding[:3].mean(0).expand(5, -1), atol=1e-6)


def test_an_adapter_folder_is_not_taken_for_a_base_nor_the_other_way_round(tmp_path):
    model = tiny_model(tmp_path)
    with pytest.raises(InputError, match="not an adapter"):
        apply_adapter(model, tmp_path / "base")


@pytest.mark.parametrize("train", ["AB", "B"])
def test_counted_parameters_are_those_that_are_trained(tmp_path, train):
    config = tiny_config(f"lora.train={train}")
    make_base(tmp_path / "base", config)
    model = load_model(tmp_path / "base")
    total = sum(p.numel() for p in model.denoiser.parameters())
    counts = count_parameters(config, base_shapes(config, tmp_path / "base"))
    assert counts["unet"] == total
    parameters = tiny_adapter(model).parameters(train)
    assert counts["trainable"] == sum(p.numel() for p in parameters.values())
    assert counts["class_embedding"] == parameters[EMBEDDING].numel()
    assert sum(counts["lora_per_kind"].values()) == counts["lora"]
    assert set(counts["lora_per_kind"]) == {
        "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_v", "attn2.to_out.0",
    }  # fmt: skip


def test_counting_needs_no_weights_and_no_base(tmp_path):
    config = tiny_config()
    make_base(tmp_path / "base", config)
    there, nowhere = (count_parameters(config, base_shapes(config, tmp_path / name)) for name in ("base", "nothing"))
    assert there == nowhere
    assert list(map(str, there.items())) == list(map(str, nowhere.items()))  # the order is the same too


@pytest.mark.parametrize(
    "others", ["", "ldm.residual_resampling=true autoencoder.kind=vq autoencoder.num_vq_embeddings=16"]
)
def test_the_files_of_a_base_have_the_names_and_shapes_of_its_networks(tmp_path, others):
    config = tiny_config(others)
    make_base(tmp_path / "base", config)
    model = load_model(tmp_path / "base")
    found = base_shapes(config, tmp_path / "base")
    assert (found.denoiser, found.vae) == (tensor_shapes(model.denoiser), tensor_shapes(model.vae))
    for network, shapes in ((model.denoiser, found.denoiser), (model.vae, found.vae)):
        assert type(network).__name__ in (*UNETS, *VAES)
        assert sum(map(math.prod, shapes.values())) == sum(p.numel() for p in network.parameters())
    linear = {name for name, module in model.denoiser.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name.removesuffix(".weight") for name, shape in found.denoiser.items() if is_linear(name, shape)} == linear
    assert (found.context, found.classes) == (model.class_embedding.shape[1], len(model.classes))


def test_layers_are_matched_in_the_order_of_a_network_s_modules_whatever_the_order_of_names():
    config = load("celebahq-eps10")
    unet, _ = meta_networks(config, Path("no such base"))
    shapes = tensor_shapes(unet)
    for targets, ends in (
        ("study", (".to_q", ".to_k", ".to_v", ".to_out.0")),
        ("ff.net.0.proj,ff.net.2", (".proj", ".2")),
    ):
        modules = [name for name, m in unet.named_modules() if isinstance(m, torch.nn.Linear) and name.endswith(ends)]
        middle = [name for name in modules if name.startswith("mid_block")]
        before_up = len([name for name in modules if name.startswith("down_blocks")])
        others = [name for name in modules if name not in middle]
        expected = [*others[:before_up], *middle, *others[before_up:]]
        assert matched_modules(shapes, targets) == matched_modules(dict(sorted(shapes.items())), targets) == expected


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_base_without_weights_or_of_another_kind_is_one_line_in_a_dry_run_too(tmp_path, part):
    config = tiny_config()
    make_base(tmp_path / "base", config)
    (weights,) = (tmp_path / "base" / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(InputError, match=f"base/{part}: cannot be read"):
        base_shapes(config, tmp_path / "base")
    weights.unlink()
    with pytest.raises(InputError, match=rf"base/{part}: holds no \*.safetensors"):
        base_shapes(config, tmp_path / "base")
    (tmp_path / "base" / part / "config.json").write_text('{"_class_name": "Other"}')
    with pytest.raises(InputError, match=f"base/{part}: holds a Other; must be a "):
        base_shapes(config, tmp_path / "base")
    (tmp_path / "base" / part / "config.json").write_text("{")
    with pytest.raises(InputError, match=f"base/{part}/config.json: cannot be read"):
        base_shapes(config, tmp_path / "base")


def test_equal_adapters_are_equal_files_whatever_the_order_of_a_set(tmp_path):
    folder = saved_adapter(tmp_path / "adapter", tiny_adapter(tiny_model(tmp_path)))
    names = read_json(folder / "peft" / "adapter_config.json")["target_modules"]
    assert names == sorted(names)
    with safe_open(folder / WEIGHTS, "pt") as weights:
        kept = json.loads(weights.metadata()["lora_adapter_metadata"])["target_modules"]
    assert kept == sorted(kept)


def test_an_adapter_s_file_has_its_metadata_in_order_and_its_tensors_as_they_were(tmp_path):
    adapter = tiny_adapter(tiny_model(tmp_path))
    folder = saved_adapter(tmp_path / "adapter", adapter)
    raw = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    assert list(json.loads(raw[8 : 8 + length])["__metadata__"]) == ["format", "lora_adapter_metadata"]
    kept = load_file(folder / WEIGHTS)
    trained = {name: tensor for name, tensor in adapter.denoiser.named_parameters() if ".lora_" in name}
    assert len(kept) == len(trained) > 0
    values = [sorted(t.flatten().tolist() for t in tensors.values()) for tensors in (kept, trained)]
    assert values[0] == values[1]


def test_a_start_of_the_embedding_that_is_no_class_of_the_base_is_refused():
    assert start_positions("mean", ["A", "B"], 2) is None
    assert start_positions("B,A,B", ["A", "B"], 3) == [1, 0, 1]
    for start, wrong in (("A,Z", "'Z' is no class of the base"), ("A", "1 names, 2 classes")):
        with pytest.raises(InputError, match=wrong):
            start_positions(start, ["A", "B"], 2)
