"""A step that runs out of memory repeats the same rows and draws, fewer at a time; no draw is lost or repeated."""

import json

import numpy as np
import pytest
import torch

from dp_lora.errors import InputError
from dp_lora.events import Events
from dp_lora.privacy.ledger import Ledger
from dp_lora.privacy.randomness import ItemStreams, Randomness
from dp_lora.privacy.step import noisy_sum
from dp_lora.privacy.sums import sum_within_memory
from dp_lora.training import finetune as finetune_module
from dp_lora.training.finetune import PrivateData, finetune, units_of
from dp_lora.training.private_loss import diffusion_loss
from dp_lora.training.run_folder import binding, open_run_folder
from tests.support.known_randomness import Known
from tests.support.tiny import far, plan_of, tiny_adapter, tiny_config, tiny_latents, tiny_model

CPU = torch.device("cpu")
PERSONS = [[0, 1, 2], [3], [4, 5]]  # with k = 3 they have 18 rows, and span micro-batches of 4 or fewer


def failing(factory, above, from_call=1):
    """The same losses on a device with memory for `above` rows: an attempt fails in its `from_call`-th micro-batch.

    It fails after the draws, as on a GPU, where the forward pass comes after them.
    """

    def made(draws):
        loss, calls = factory(draws), []

        def limited(copies, rows):
            calls.append(len(rows.slot))
            losses = loss(copies, rows)
            if len(rows.slot) > above and len(calls) >= from_call:
                raise torch.OutOfMemoryError("CUDA out of memory, pretended")
            return losses

        return limited

    return made


@pytest.fixture
def private(tmp_path):
    config, model = tiny_config(), tiny_model(tmp_path)
    latents, labels = tiny_latents()
    return diffusion_loss(config, model, latents, labels, CPU), tiny_adapter(model).parameters("AB")


def summed(factory, parameters, size, back_off=True):
    return sum_within_memory(factory, ItemStreams(4), parameters, PERSONS, 3, 0.01, size, back_off)


@pytest.mark.parametrize("from_call", [1, 2])
def test_backing_off_gives_the_sum_that_never_failed_with_k_draws_and_persons_across_micro_batches(private, from_call):
    factory, parameters = private
    whole, norms, losses, size = summed(factory, parameters, 3)
    assert size == 3
    backed_off, other_norms, other_losses, size = summed(failing(factory, 4, from_call), parameters, 12)
    assert size == 3
    assert far(backed_off, whole) < 1e-6
    torch.testing.assert_close(other_norms, norms, rtol=1e-6, atol=0)
    torch.testing.assert_close(other_losses, losses, rtol=1e-6, atol=0)
    # a sum that is cut into other micro-batches agrees too, up to rounding
    assert far(backed_off, summed(factory, parameters, 18)[0]) < 1e-5


def test_a_mutant_that_goes_on_with_streams_that_moved_is_caught(private, monkeypatch):
    factory, parameters = private
    whole = summed(factory, parameters, 3)[0]
    monkeypatch.setattr(ItemStreams, "from_the_start", lambda self: self)
    assert far(summed(failing(factory, 4), parameters, 12)[0], whole) > 1e-2


def test_a_step_that_backs_off_draws_units_pictures_and_noise_once_and_leaves_one_ledger_line(private, tmp_path):
    factory, parameters = private
    plan = plan_of(sample_rate=0.9, k=4, unit="person")
    steps = []
    for name, used in (("never", factory), ("failed", failing(factory, 2))):
        (tmp_path / name).mkdir()
        ledger, randomness = Ledger(tmp_path / name / "ledger.jsonl"), Known()
        total, facts = noisy_sum(plan, 0, PERSONS, used, parameters, randomness, ledger, 2 if name == "never" else 16)
        assert facts.physical_batch_size == 2
        assert randomness.asked == ["sampling", "draws", "noise"]
        steps.append((total, [json.loads(line)["entry"]["step"] for line in ledger.path.read_text().splitlines()]))
    assert far(steps[1][0], steps[0][0]) < 1e-6
    assert steps[1][1] == steps[0][1] == [0]


def test_a_row_that_does_not_fit_is_one_line_and_nothing_is_spent(private, tmp_path):
    factory, parameters = private
    ledger = Ledger(tmp_path / "ledger.jsonl")
    with pytest.raises(InputError, match=r"compute\.physical_batch_size=1: one row does not fit") as error:
        noisy_sum(plan_of(sample_rate=1.0), 0, PERSONS, failing(factory, 0), parameters, Known(), ledger, 9)
    assert "\n" not in str(error.value)
    assert not ledger.path.exists()


def test_the_reproducible_mode_does_not_back_off(private, tmp_path):
    factory, parameters = private
    ledger = Ledger(tmp_path / "ledger.jsonl")
    replayed = Randomness("run", b"s" * 32)
    with pytest.raises(InputError, match=r"compute\.physical_batch_size=9: does not fit .* does not back off"):
        noisy_sum(plan_of(sample_rate=1.0), 0, PERSONS, failing(factory, 4), parameters, replayed, ledger, 9)
    assert not ledger.path.exists()


def test_a_fine_tuning_goes_on_with_fewer_rows_and_keeps_the_number_only_where_it_was_chosen(
    tmp_path, monkeypatch, capsys
):
    heard = []

    class Heard(Events):
        def metric(self, name, value, step=None):
            if name == "private/physical_batch_size":
                heard.append(value)

        def message(self, text):
            heard.append(text)

    real = finetune_module.diffusion_loss
    monkeypatch.setattr(finetune_module, "diffusion_loss", lambda *rest: failing(real(*rest), 3))
    monkeypatch.setattr(finetune_module, "physical_batch_size", lambda *_: 8)
    model, rng = tiny_model(tmp_path), np.random.default_rng(0)
    for number, chosen in enumerate(("compute.physical_batch_size=null", "compute.physical_batch_size=8")):
        config = tiny_config(f"privacy.eps=inf privacy.batch_size=40 privacy.k=2 privacy.epochs=2 {chosen}")
        data = PrivateData(
            rng.standard_normal((6, 2, 8, 8)).astype(np.float32), np.zeros(6, np.int64), units_of(6, None, "picture")
        )
        folder = tmp_path / f"run{number}"
        with open_run_folder(folder, config, binding(config, "d", "b", "cpu")) as run:
            finetune(config, model, {"path": "base", "digest": "b"}, data, run, CPU, Heard(), lambda *_: None)
            assert run.ledger.counted_steps(run.plan) == 2
        kept = json.loads((folder / "plan.json").read_text()).get("physical_batch_size")
        assert kept == (2 if chosen.endswith("null") else None)
        # the message goes to the terminal alone: it depends on who was drawn
        assert heard == [2, 2]
        assert "out of memory: from here on 2 rows at a time; no draw is lost or repeated" in capsys.readouterr().err
        heard.clear()
        model = tiny_model(tmp_path / "again")
