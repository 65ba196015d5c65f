"""The number of rows computed at a time is found on dummy data and kept with the plan; it never changes the result."""

import json
import math
from contextlib import nullcontext

import pytest
import torch

from dp_lora.config import load
from dp_lora.errors import InputError
from dp_lora.events import Events
from dp_lora.privacy.gradients import rows_at_once
from dp_lora.training import physical_batch as module
from dp_lora.training.physical_batch import evenly, fits, largest_that_fits, physical_batch_size
from dp_lora.training.run_folder import binding, open_run_folder
from tests.support.tiny import tiny_adapter, tiny_config, tiny_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CHOSEN = "compute.physical_batch_size=null"


@pytest.mark.parametrize("at_most", [1, 2, 7, 16, 1000])
@pytest.mark.parametrize("limit", [0, 1, 2, 3, 5, 16, 37, 999, 1000, 10**6])
def test_the_search_finds_the_largest_size_that_fits_in_few_tries(limit, at_most):
    tried = []

    def holds(size):
        tried.append(size)
        return size <= limit

    assert largest_that_fits(holds, at_most) == min(limit, at_most)
    assert all(1 <= size <= at_most for size in tried)
    assert len(tried) <= 2 * math.log2(at_most) + 2


def opened(tmp_path, overrides=CHOSEN):
    config = tiny_config(f"{overrides} privacy.eps=inf")
    return config, open_run_folder(tmp_path / "run", config, binding(config, "d", "b", "cpu"))


def pretend_gpu(monkeypatch, limit):
    """Pretend a GPU with memory for `limit` rows; returns the list of sizes that the code tries on it."""
    tried = []

    def holds(config, model, parameters, device, k, size):
        tried.append(size)
        return size <= limit

    monkeypatch.setattr(module, "fits", holds)
    monkeypatch.setattr(module, "_part_of_the_memory", lambda device: nullcontext())
    return tried


def test_the_choice_is_written_beside_the_plan_and_kept_on_resume(tmp_path, monkeypatch, capsys):
    tried = pretend_gpu(monkeypatch, 13)
    for _ in range(2):
        config, folder = opened(tmp_path, f"{CHOSEN} privacy.k=4")
        with folder as run:
            assert physical_batch_size(config, None, {}, run, GPU, Events()) == 12
    assert tried == [4, 8, 16, 12]
    content = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert content["physical_batch_size"] == 12
    assert "physical_batch_size" not in content["plan"]
    assert "12 rows at a time" in capsys.readouterr().err


def test_no_more_is_tried_than_a_step_has_rows_by_public_numbers(tmp_path, monkeypatch):
    tried = pretend_gpu(monkeypatch, 10**9)
    config, folder = opened(tmp_path, f"{CHOSEN} privacy.k=3")
    with folder as run:
        assert physical_batch_size(config, None, {}, run, GPU, Events()) == 14 * 3
    assert max(tried) == 14 * 3


@pytest.mark.parametrize(("limit", "rows"), [(3, 3), (4, 4), (7, 6), (11, 6), (12, 12), (25, 24), (10**9, 168)])
def test_the_search_takes_whole_pictures_or_an_equal_share_of_the_draws_of_one(tmp_path, monkeypatch, limit, rows):
    pretend_gpu(monkeypatch, limit)
    config, folder = opened(tmp_path, f"{CHOSEN} privacy.k=12")
    with folder as run:
        assert physical_batch_size(config, None, {}, run, GPU, Events()) == rows


@pytest.mark.parametrize(
    ("configured", "k", "rows"),
    [(5, 1, 5), (8, 3, 6), (9, 3, 9), (150, 12, 84), (100, 12, 84), (8, 12, 6), (10**6, 12, 168)],
)
def test_a_number_in_the_config_becomes_one_that_cuts_no_picture_and_pads_little_and_nothing_is_tried(
    tmp_path, monkeypatch, capsys, configured, k, rows
):
    tried = pretend_gpu(monkeypatch, 1)
    config, folder = opened(tmp_path, f"compute.physical_batch_size={configured} privacy.k={k}")
    with folder as run:
        assert physical_batch_size(config, None, {}, run, GPU, Events()) == rows
    assert not tried
    said = capsys.readouterr().err
    assert (f"compute.physical_batch_size={configured}: {rows} rows at a time" in said) == (rows != configured)


@pytest.mark.parametrize(
    ("step", "at_most", "k", "rows"),
    [(768, 256, 12, 192), (440, 150, 1, 147), (440, 440, 1, 440), (5, 100, 1, 5), (60, 8, 12, 6)],
)
def test_micro_batches_are_as_few_as_fit_and_the_last_one_is_nearly_full(step, at_most, k, rows):
    assert evenly(step, at_most, k) == rows
    assert rows <= at_most
    assert math.ceil(step / rows) == math.ceil(step / rows_at_once(k, at_most))


def test_the_rows_of_a_step_are_divided_among_the_ranks(tmp_path, monkeypatch):
    tried = pretend_gpu(monkeypatch, 10**9)
    config, folder = opened(tmp_path, f"{CHOSEN} privacy.k=3")
    with folder as run:
        assert physical_batch_size(config, None, {}, run, GPU, Events(), ranks=2) == 7 * 3
    assert max(tried) == 7 * 3


def test_a_gpu_without_room_for_one_row_is_one_line(tmp_path, monkeypatch):
    pretend_gpu(monkeypatch, 0)
    config, folder = opened(tmp_path)
    with folder as run, pytest.raises(InputError, match="not one row fits"):
        physical_batch_size(config, None, {}, run, GPU, Events())


def test_a_size_that_is_tried_is_computed_on_dummy_pictures_of_uneven_units_twice_in_a_row(tmp_path, monkeypatch):
    config, model = tiny_config(CHOSEN), tiny_model(tmp_path)
    parameters = tiny_adapter(model).parameters("AB")
    real, seen = module.sum_over_units, []

    def limited(loss, parameters, batches, max_grad_norm):
        def watched(copies, rows):
            seen.append((len(set(rows.units)), len(rows.slot)))
            if len(rows.slot) > 6:
                raise torch.OutOfMemoryError("of a GPU that is pretended")
            return loss(copies, rows)

        return real(watched, parameters, batches, max_grad_norm)

    monkeypatch.setattr(module, "sum_over_units", limited)
    assert fits(config, model, parameters, CPU, 1, 6)
    assert seen == [(5, 6), (6, 6)]
    assert not fits(config, model, parameters, CPU, 1, 7)
    assert largest_that_fits(lambda size: fits(config, model, parameters, CPU, 1, size), 100) == 6
    # one picture with four draws, computed in parts of two
    seen.clear()
    assert fits(config, model, parameters, CPU, 4, 2)
    assert seen == [(1, 2), (1, 2)]


def test_on_a_cpu_at_most_eight_rows_are_taken_and_nothing_is_tried(tmp_path, monkeypatch):
    tried = pretend_gpu(monkeypatch, 10**9)
    config, folder = opened(tmp_path)
    with folder as run:
        assert physical_batch_size(config, None, {}, run, CPU, Events()) == 7  # a step has 14 rows
    assert not tried


def test_the_reproducible_mode_needs_the_number_of_rows():
    with pytest.raises(InputError, match=r"compute\.physical_batch_size=null: must be set with privacy\.reproducible"):
        load("mnist5k", {}, f"{CHOSEN} privacy.reproducible=true privacy.seed_file=seed")
