"""The private step uses bfloat16 in the network's forward pass alone; it clips and sums in float32 or wider."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from dp_lora.config import load
from dp_lora.errors import InputError
from dp_lora.events import Events
from dp_lora.models.device import full_precision, pick_precision
from dp_lora.models.folder import load_model
from dp_lora.privacy.accounting import noise_multiplier_for, spent
from dp_lora.privacy.gradients import NOBODY, micro_batches, part_gradients
from dp_lora.privacy.ledger import Ledger
from dp_lora.privacy.noise import add_noise
from dp_lora.privacy.plan import ROUNDING, require_stated_number
from dp_lora.privacy.randomness import ItemStreams, Randomness
from dp_lora.privacy.rounding import require_small_rounding
from dp_lora.privacy.step import noisy_sum
from dp_lora.privacy.sums import sum_over_units
from dp_lora.training.finetune import PrivateData, finetune, make_adapter, units_of
from dp_lora.training.plan import make_plan
from dp_lora.training.private_loss import diffusion_loss
from dp_lora.training.run_folder import binding, open_run_folder
from tests.support.rounding_cases import ROUNDING_CASES, measured_rest
from tests.support.tiny import (
    difference,
    no_privacy,
    plan_of,
    tiny_adapter,
    tiny_config,
    tiny_latents,
    tiny_model,
    total_norm,
)

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
    (rows,) = micro_batches(UNITS, 2, 12, CPU)
    found = {}
    for precision in ("float32", "bfloat16"):
        loss = loss_in(precision, model)(ItemStreams(11))
        copies = {name: value.detach().expand(rows.copies, *value.shape) for name, value in parameters.items()}
        assert loss(copies, rows).dtype == torch.float32
        found[precision], unit_losses = part_gradients(loss, parameters, rows)
        assert unit_losses.dtype == torch.float32
        assert {gradient.dtype for gradient in found[precision].values()} == {torch.float32}
    for unit in range(len(UNITS)):
        exact, near = ({name: value[unit] for name, value in found[p].items()} for p in found)
        # bfloat16 has eight bits of mantissa
        assert 1e-5 < total_norm(difference(near, exact)) / total_norm(exact) < 0.05


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "n", "k", "rows"), [("picture", 40, 3, 25), ("picture", 5, 12, 8), ("person", 20, 1, 12)]
)
def test_a_unit_that_joins_does_not_move_the_sum_of_the_others(tmp_path, precision, kind, n, k, rows):
    """The unit that joins comes first, so the rows of all others change their places in the micro-batches."""
    assert measured_rest(tmp_path, CPU, precision, kind, n, k, rows) < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", [120, 480])
@pytest.mark.parametrize(("kind", "k", "rows"), ROUNDING_CASES)
def test_a_unit_that_joins_does_not_move_the_sum_of_many_others(tmp_path, precision, n, kind, k, rows):
    assert measured_rest(tmp_path, CPU, precision, kind, n, k, rows) < ROUNDING


def test_a_person_whose_parts_cancel_is_the_same_wherever_she_is_cut():
    """Large numbers cancel here: another order of additions leaves another small rest, and the clip makes it large."""
    torch.manual_seed(0)
    v, w, x = torch.randn(3, 40)
    directions = torch.stack([1e20 * v, 3e19 * w, x, -1e20 * v, 7 * x, -3e19 * w, -x])

    def loss(copies, rows):
        return (copies["w"][rows.slot] * directions[rows.picture]).sum(1)

    def total(size, person=range(7)):
        batches = micro_batches([[5], list(person), [4]], 2, size, CPU)
        return sum_over_units(loss, {"w": torch.zeros(40)}, batches, 1.0)[0]

    assert max(total_norm(difference(total(size), total(18))) for size in (2, 4, 6, 10)) < 1e-12
    # a mutant that adds a person's pictures in another order is far off
    assert total_norm(difference(total(18, [6, 5, 4, 3, 2, 1, 0]), total(18))) > 0.1


def own_directions(draws, rows):
    """A draw (R, 50) for each row from its picture's own stream; zeros for padding."""
    own = torch.zeros(len(rows.picture), 50)
    for row, picture in enumerate(rows.picture.tolist()):
        if picture != NOBODY:
            own[row] = torch.from_numpy(draws[picture].standard_normal(50))
    return own


def slot_dependent(amount):
    """A loss whose kernels round a row differently, by `amount`, in each place of a micro-batch."""

    def factory(draws):
        def loss(copies, rows):
            own = own_directions(draws, rows)
            wrong = torch.randn(rows.copies, 50, generator=torch.Generator().manual_seed(1)) * amount
            return (copies["w"][rows.slot] * (own + wrong[rows.slot])).sum(1)

        return loss

    return factory


@pytest.mark.parametrize("k", [1, 3])
def test_kernels_that_round_by_more_than_the_noise_covers_are_refused_before_the_first_step(k):
    parameters = {"w": torch.zeros(50)}
    plan = plan_of(expected_batch=1000.0, k=k)
    require_small_rounding(plan, slot_dependent(1e-6), parameters, 8)
    with pytest.raises(InputError, match=r"rounding on this device: .* set compute\.precision=float32"):
        require_small_rounding(plan, slot_dependent(1e-4), parameters, 8)
    # the noise covers the rounding of a few units
    require_small_rounding(plan_of(expected_batch=4.0, k=k), slot_dependent(1e-4), parameters, 8)
    require_small_rounding(no_privacy(expected_batch=1000.0), slot_dependent(1e-4), parameters, 8)
    with pytest.raises(InputError, match="rounding on this device"):
        require_small_rounding(plan_of(expected_batch=1000.0, k=k, unit="person"), slot_dependent(1e-4), parameters, 8)


def test_kernels_that_round_otherwise_from_the_middle_of_a_micro_batch_on_are_refused():
    """A shift by one place moves one unit into the other half; a shift by half a micro-batch moves all units."""

    def in_halves(draws):
        def loss(copies, rows):
            own = own_directions(draws, rows)
            second_half = (rows.slot >= rows.copies // 2)[:, None]
            return (copies["w"][rows.slot] * (own + 1e-4 * own.roll(1, 1) * second_half)).sum(1)

        return loss

    with pytest.raises(InputError, match="rounding on this device"):
        require_small_rounding(plan_of(expected_batch=200.0), in_halves, {"w": torch.zeros(50)}, 64)


def test_kernels_that_round_a_gradient_that_is_still_zero_are_refused():
    """LoRA's B starts at 0, so A's gradient is zero, and a measurement there would miss A's rounding."""

    def loss(draws):
        inner = slot_dependent(1e-4)(draws)
        return lambda copies, rows: copies["B"][rows.slot, 0] * inner({"w": copies["A"]}, rows)

    with pytest.raises(InputError, match="rounding on this device"):
        require_small_rounding(plan_of(expected_batch=1000.0), loss, {"A": torch.zeros(50), "B": torch.zeros(1)}, 8)


def test_every_plan_has_noise_for_a_unit_and_for_what_it_rounds():
    config = tiny_config("privacy.k=3")
    plan = make_plan(config)
    assert plan.sensitivity == 1 + ROUNDING
    exact = noise_multiplier_for(plan.target_epsilon, plan.delta, plan.sample_rate, plan.steps)
    assert plan.noise_multiplier == pytest.approx(exact * (1 + ROUNDING), rel=1e-12)
    assert spent(plan, plan.steps).epsilon <= plan.target_epsilon
    with pytest.raises(InputError, match="expected_batch=600000: must be at most 262,144"):
        plan_of(expected_batch=600_000.0)


def test_more_than_twice_as_many_units_as_are_stated_are_refused_on_the_terminal_alone():
    """The noise covers the rounding of the expected batch alone, which n_public gives."""
    plan = plan_of(sample_rate=0.1, expected_batch=10.0)
    require_stated_number(plan, 200)
    require_stated_number(no_privacy(sample_rate=0.1, expected_batch=10.0), 10**6)
    with pytest.raises(InputError, match="n_public=100: there are more than twice as many units") as caught:
        require_stated_number(plan, 201)
    assert "n_public" not in caught.value.public


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_trained_tensor_in_half_precision_is_refused_by_name_before_anybody_is_drawn(tmp_path, dtype):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    parameters = {"class_embedding.weight": torch.zeros(2, 3, dtype=dtype)}
    with pytest.raises(InputError, match=r"class_embedding\.weight: is torch\.\w+; .* float32 or wider"):
        noisy_sum(plan_of(), 0, UNITS, slot_dependent(0.0), parameters, Randomness("run"), ledger, 4)
    assert not ledger.path.exists()
    with pytest.raises(InputError, match="float32 or wider"):
        add_noise(parameters, 1.0, Randomness("run").numpy("noise", 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_with_a_class_embedding_in_half_precision_is_trained_in_float32(tmp_path, dtype):
    tiny_model(tmp_path)
    file = tmp_path / "base" / "class_embedding.safetensors"
    save_file({"weight": load_file(file)["weight"].to(dtype)}, file)
    model = load_model(tmp_path / "base")
    adapter = make_adapter(tiny_config(), model, CPU)
    assert {parameter.dtype for parameter in adapter.parameters("AB").values()} == {torch.float32}


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
