"""A pipeline held in bfloat16: adapters, gradients and sums are float32 or wider; rows stay independent."""

import pytest
import torch

from dp_lora.diffusion import Flow
from dp_lora.models.adapters import lora_parameters, use_checkpointing
from dp_lora.models.folder import load_model
from dp_lora.privacy.ledger import Ledger
from dp_lora.privacy.randomness import Randomness
from dp_lora.privacy.step import noisy_sum
from dp_lora.sampling import draw
from dp_lora.training.private_loss import diffusion_loss
from tests.support.text2image import LABELS, fine_tuned, gradients_of, prepared
from tests.support.tiny import difference, plan_of, total_norm
from tests.support.tiny_pipelines import BUILD, make_pipeline

CPU = torch.device("cpu")
HALF = "compute.precision=bfloat16"
UNITS = [[0], [1, 2], [3, 4, 5]]
FAST = ("sd", "flux")  # a UNet and a transformer; tests of the others are slow
FAMILIES = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in BUILD]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {name: make_pipeline(folder / name, name) for name in BUILD}


@pytest.mark.parametrize("name", FAMILIES)
def test_each_unit_s_gradient_is_that_of_its_rows_alone_in_bfloat16_too(name, bases, tmp_path, monkeypatch):
    of = prepared(bases, name, tmp_path, HALF)
    model, adapter = of[1], of[2]
    frozen = {weight.dtype for key, weight in model.denoiser.named_parameters() if "lora_" not in key}
    assert frozen == {torch.bfloat16}
    assert {weight.dtype for weight in adapter.parameters("AB").values()} == {torch.float32}
    together = gradients_of(*of, UNITS, 6)
    for number, unit in enumerate(UNITS):
        alone = gradients_of(*of, [unit], len(unit))[0]
        # bfloat16 has eight bits of mantissa, and kernels add up a batch of another size in another order
        assert total_norm(difference(together[number], alone)) < 0.02 * total_norm(alone)
    if name == "flux":
        # diffusers rounds FLUX's times to the precision of its weights, and once more in thousandths
        drawn = Flow.time
        rounded = lambda *given: float(torch.tensor(drawn(*given), dtype=torch.bfloat16) * 1000) / 1000  # noqa: E731
        monkeypatch.setattr(Flow, "time", rounded)
    exact = gradients_of(*prepared(bases, name, tmp_path), UNITS, 6)
    for number in range(len(UNITS)):
        assert 1e-4 < total_norm(difference(together[number], exact[number])) / total_norm(exact[number]) < 0.1


@pytest.mark.parametrize("name", FAMILIES)
def test_in_bfloat16_a_row_does_not_move_when_another_one_changes(name, bases, tmp_path):
    config, model, adapter, latents, captions = prepared(bases, name, tmp_path, HALF)
    before = gradients_of(config, model, adapter, latents, captions, UNITS, 6)
    latents[0] += 1
    after = gradients_of(config, model, adapter, latents, captions, UNITS, 6)
    assert total_norm(difference(before[0], after[0])) > 0
    for number in (1, 2):
        assert total_norm(difference(before[number], after[number])) == 0


@pytest.mark.parametrize("name", ["sdxl", "flux", "dit"])
def test_no_layer_of_a_base_in_bfloat16_keeps_a_float32_copy_of_its_input(name, bases, tmp_path):
    config, model, adapter, latents, captions = prepared(bases, name, tmp_path, HALF)
    wide = {}

    def note(tensor):
        if tensor.dtype == torch.float32 and tensor.ndim > 2:
            wide[tensor.untyped_storage().data_ptr()] = tuple(tensor.shape)
        return tensor

    known = {weight.untyped_storage().data_ptr() for weight in lora_parameters(model.denoiser, "AB").values()}
    seen = []
    for layer in model.denoiser.modules():
        if hasattr(layer, "lora_A"):
            layer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        gradients_of(config, model, adapter, latents, captions, [[0]], 1)
    assert {tensor.dtype for tensor in seen} == {torch.bfloat16}
    shapes = {tuple(tensor.shape) for tensor in seen}
    assert not [shape for place, shape in wide.items() if place not in known and shape in shapes]


def test_the_noisy_sum_over_a_base_in_bfloat16_is_float32(bases, tmp_path):
    config, model, adapter, latents, captions = prepared(bases, "sd", tmp_path, HALF)
    loss = diffusion_loss(config, model, latents, LABELS, CPU, captions)
    ledger, plan = Ledger(tmp_path / "ledger.jsonl"), plan_of(sample_rate=1.0)
    total, _ = noisy_sum(plan, 0, UNITS, loss, adapter.parameters("AB"), Randomness("run"), ledger, 4)
    assert {value.dtype for value in total.values()} == {torch.float32}


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_checkpointing_changes_no_gradient_in_bfloat16(name, bases, tmp_path):
    of = prepared(bases, name, tmp_path, HALF)
    before = gradients_of(*of, UNITS, 6)
    use_checkpointing(of[1].denoiser)
    after = gradients_of(*of, UNITS, 6)
    assert max(total_norm(difference(before[number], after[number])) for number in before) == 0


@pytest.mark.parametrize("name", ["sd", pytest.param("flux", marks=pytest.mark.slow)])
def test_captions_of_a_base_in_bfloat16_are_kept_in_half_the_bytes(name, bases, tmp_path):
    sizes = {}
    for precision in ("float32", "bfloat16"):
        folder = tmp_path / precision
        captions = prepared(bases, name, folder, f"compute.precision={precision}")[4]
        assert captions.tensors["context"].dtype == getattr(torch, precision)
        sizes[precision] = (next(folder.rglob("context.npy"))).stat().st_size - 128
    assert sizes["bfloat16"] * 2 == sizes["float32"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_fine_tuning_in_bfloat16_ends_in_a_release_that_is_drawn_in_bfloat16(name, bases, tmp_path):
    from dp_lora.models.adapters import apply_adapter, ready_to_draw
    from tests.support.text2image import text_config

    release = fine_tuned(tmp_path, bases[name], HALF)
    config = text_config("sampling.precision=bfloat16", name)
    model = ready_to_draw(apply_adapter(load_model(bases[name], CPU, torch.bfloat16), release), config)
    images = draw(model, [0, 1], [0, 0], config.sampling, 3, CPU)
    assert images.shape == (2, 32, 32, 3)
