"""bfloat16 in the private step: in the network's forward pass alone; what is clipped, summed and hidden is float32."""

import pytest
import torch
from safetensors.torch import load_file
from tiny import difference, plan_of, tiny_adapter, tiny_config, tiny_latents, tiny_model, total_norm

from dp_lora.config import load
from dp_lora.errors import InputError
from dp_lora.events import Events
from dp_lora.models.device import full_precision, pick_precision
from dp_lora.privacy.gradients import micro_batches, unit_gradients
from dp_lora.privacy.ledger import Ledger
from dp_lora.privacy.randomness import ItemStreams, Randomness
from dp_lora.privacy.step import noisy_sum
from dp_lora.privacy.sums import sum_over_units
from dp_lora.training.finetune import PrivateData, finetune, units_of
from dp_lora.training.private_loss import diffusion_loss
from dp_lora.training.run_folder import binding, open_run_folder

CPU, GPU = torch.device("cpu"), torch.device("cuda")
UNITS = [[0], [1, 2, 3], [4], [5]]


def test_auto_is_bfloat16_on_a_gpu_that_has_it_and_never_on_a_cpu(monkeypatch):
    for there, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, there=there: there)
        assert pick_precision("auto", GPU) == expected
        assert pick_precision("auto", CPU) == pick_precision("float32", GPU) == torch.float32
        assert pick_precision("bfloat16", CPU) == torch.bfloat16
    with pytest.raises(InputError, match=r"compute\.precision=bfloat16: this GPU has none"):
        pick_precision("bfloat16", GPU)
    with pytest.raises(InputError, match=r"compute\.precision=float16: must be one of"):
        load("mnist5k", {}, "compute.precision=float16")


def loss_in(precision, model):
    latents, labels = tiny_latents()
    return diffusion_loss(tiny_config(f"compute.precision={precision}"), model, latents, labels, CPU)


@pytest.mark.parametrize("targets", ["default", "study"])
def test_gradients_of_a_bfloat16_forward_pass_are_float32_and_near_those_of_float32(tmp_path, targets):
    model = tiny_model(tmp_path)
    parameters = tiny_adapter(model, targets).parameters("AB")
    (rows,) = micro_batches(UNITS, 2, 1000, CPU)
    found = {}
    for precision in ("float32", "bfloat16"):
        loss = loss_in(precision, model)(ItemStreams(11))
        losses = loss({name: value.detach().unsqueeze(0).repeat(4, 1, 1) for name, value in parameters.items()}, rows)
        assert losses.dtype == torch.float32
        found[precision], unit_losses = unit_gradients(loss, parameters, rows)
        assert unit_losses.dtype == torch.float32
        assert {gradient.dtype for gradient in found[precision].values()} == {torch.float32}
    for unit in range(len(UNITS)):
        exact, near = ({name: value[unit] for name, value in found[p].items()} for p in found)
        # eight bits of mantissa
        assert 1e-5 < total_norm(difference(near, exact)) / total_norm(exact) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "slack"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_a_unit_among_many_moves_the_sum_by_c_up_to_the_rounding_that_is_stated(tmp_path, precision, slack):
    """The one that joins is the first: the rows of all others change their places in the micro-batches."""
    latents, labels = tiny_latents(121)
    model = tiny_model(tmp_path)
    parameters = tiny_adapter(model).parameters("AB")
    config = tiny_config(f"compute.precision={precision}")
    factory = diffusion_loss(config, model, latents, labels, CPU)
    c = 1e-4  # below the norms: the one that joins, and the others, are all clipped
    sums = []
    for units in ([[i] for i in range(121)], [[i] for i in range(1, 121)]):
        batches = micro_batches(units, 3, 8, CPU)
        total, norms, _ = sum_over_units(factory(ItemStreams(11)), parameters, batches, c)
        assert norms.min() > c
        sums.append(total)
    moved = total_norm(difference(*sums)) / c
    assert abs(moved - 1) < slack


def test_the_noisy_sum_of_a_bfloat16_forward_pass_is_float32(tmp_path):
    model = tiny_model(tmp_path)
    parameters = tiny_adapter(model).parameters("AB")
    ledger = Ledger(tmp_path / "ledger.jsonl")
    plan = plan_of(sample_rate=1.0)
    total, _ = noisy_sum(plan, 0, UNITS, loss_in("bfloat16", model), parameters, Randomness("run"), ledger, 4)
    assert {value.dtype for value in total.values()} == {torch.float32}


def test_a_fine_tuning_in_bfloat16_ends_in_an_adapter_of_float32(tmp_path):
    config = tiny_config("compute.precision=bfloat16 privacy.eps=inf")
    model = tiny_model(tmp_path)
    latents, labels = tiny_latents()
    data = PrivateData(latents, labels, units_of(6, None, "picture"))
    with open_run_folder(tmp_path / "run", config, binding(config, "d", "b", "cpu")) as run:
        adapter = finetune(config, model, {"path": "base", "digest": "b"}, data, run, CPU, Events(), lambda *_: None)
    for name in ("class_embedding.safetensors", "peft/adapter_model.safetensors"):
        assert {value.dtype for value in load_file(adapter / name).values()} == {torch.float32}


def test_a_replay_is_bound_to_its_precision_and_a_fresh_run_is_not():
    def bound(precision, overrides=""):
        return binding(tiny_config(f"compute.precision={precision} {overrides}"), "d", "b", "cpu")

    seeded = "privacy.reproducible=true privacy.seed_file=seed"
    assert bound("bfloat16", seeded) != bound("float32", seeded) == bound("auto", seeded)
    assert bound("bfloat16") == bound("float32")


def test_tf32_is_off_inside_the_private_step_and_as_it_was_after():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with full_precision():
            assert not torch.backends.cuda.matmul.allow_tf32
            assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before[0]
    assert torch.backends.cudnn.allow_tf32 == before[1]
