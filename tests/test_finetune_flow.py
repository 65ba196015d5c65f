"""Checks 6, 7, 11, 13 on whole fine-tunings: fresh draws, empty draws, torn lines, a flow independent of the data."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from dp_lora.errors import InputError
from dp_lora.files import read_json
from dp_lora.models.adapters import EMBEDDING
from dp_lora.models.folder import load_model
from dp_lora.models.info import model_digest
from dp_lora.privacy import step as step_module
from dp_lora.training import checkpoints
from dp_lora.training import finetune as module
from dp_lora.training.finetune import PrivateData, finetune
from dp_lora.training.run_folder import binding, open_run_folder
from tests.support.finetuning import CPU, Crash, Heard, house, run, seed_file, weights
from tests.support.tiny import tiny_config, tiny_dataset

__all__ = ["house"]


@pytest.mark.parametrize("replay", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_who_takes_part_is_drawn_anew_after_a_resume_and_again_only_in_a_replay(house, monkeypatch, replay):
    drawn = []
    real = step_module.poisson_draw
    monkeypatch.setattr(step_module, "poisson_draw", lambda *a: (drawn.append(real(*a)), drawn[-1])[1])
    config = "train.checkpoint_every=2" + (f" {seed_file(house)}" if replay else "")
    with pytest.raises(Crash):
        run(house, "run", config, stop_before=3, monkeypatch=monkeypatch)
    run(house, "run", config)
    # the steps drawn are 0, 1, 2, and after the crash 2, 3 and so on
    lost, again = drawn[2], drawn[3]
    assert np.array_equal(lost, again) is replay
    assert len({tuple(draw) for draw in drawn[:3]}) == 3


def test_a_run_whose_every_draw_is_empty_trains_on_noise_alone_and_counts_every_step(house):
    config, model = tiny_config(), load_model(house / "base")
    start = module.make_adapter(config, load_model(house / "base"), CPU).parameters("B")
    nobody = PrivateData(np.zeros((0, 2, 8, 8), np.float32), np.zeros(0, np.int64), [])
    bound = binding(config, "nobody", model_digest(house / "base"), "cpu")
    heard = Heard()
    with open_run_folder(house / "run", config, bound) as opened:
        names = {"path": "base", "digest": bound["base"]}
        release = finetune(config, model, names, nobody, opened, CPU, heard, lambda *_: None)
    assert read_json(release / "privacy.json")["steps"] == opened.ledger.counted_steps(opened.plan) == 5
    trained = weights(release)
    for name, value in start.items():
        key = "embedding" if name == EMBEDDING else f"base_model.model.{name}.weight"
        assert not torch.equal(trained[key], value), name
    assert all(np.isnan(heard.metrics["private/loss"]))


def flow(house, folder, monkeypatch, data="data"):
    """Everything about a fine-tuning that an outsider could see, except the values of its release."""
    noises, kept, draws = [], [], []
    heard = Heard()
    noise, save, poisson = step_module.add_noise, checkpoints.save_checkpoint, step_module.poisson_draw

    def spy_noise(total, std, generator):
        noises.append((std, {name: tuple(tensor.shape) for name, tensor in total.items()}))
        return noise(total, std, generator)

    def spy_save(folder, step, counted, tensors):
        kept.append((step, {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}))
        save(folder, step, counted, tensors)

    def third_is_empty(*arguments):
        draws.append(poisson(*arguments))
        return draws[-1][:0] if len(draws) == 3 else draws[-1]

    with monkeypatch.context() as patched:
        patched.setattr(step_module, "add_noise", spy_noise)
        patched.setattr(checkpoints, "save_checkpoint", spy_save)
        patched.setattr(step_module, "poisson_draw", third_is_empty)
        release = run(house, folder, seed_file(house), heard, data)
    lines = [json.loads(line)["entry"]["step"] for line in (house / folder / "ledger.jsonl").read_text().splitlines()]
    files = {p.relative_to(release): p.stat().st_size for p in release.rglob("*") if p.suffix == ".safetensors"}
    counts = {name: len(values) for name, values in heard.metrics.items()}
    return noises, kept, lines, files, counts, heard.lines


def test_neighbours_have_one_flow_one_number_of_noises_and_equal_shapes(house, monkeypatch):
    """One draw is empty: a mutant that skips its noise has fewer noises than steps."""
    tiny_dataset(house / "more", n=42)
    one, other = flow(house, "one", monkeypatch), flow(house, "other", monkeypatch, "more")
    assert one == other
    assert len(one[0]) == len(one[1]) == len(one[2]) == 5


def test_no_branch_and_no_message_depends_on_what_the_operator_may_watch(house, monkeypatch):
    """Clipped share, loss and norms go to the log under private/, and nowhere else."""
    seeded = seed_file(house)
    ends = []
    real = module.noisy_sum
    for number, share in enumerate((0.0, 0.5, 1.0)):
        watched = {"clipped_share": share, "loss": 10.0**number, "mean_norm": 7.0 * number, "units": number}

        def changed(*arguments, watched=watched):
            total, facts = real(*arguments)
            return total, dataclasses.replace(facts, **watched)

        heard = Heard()
        monkeypatch.setattr(module, "noisy_sum", changed)
        release = run(house, f"run{number}", seeded, heard)
        assert heard.metrics["private/clipped_share"] == [share] * 5
        ledger = (house / f"run{number}" / "ledger.jsonl").read_bytes()
        ends.append((heard.lines, {name: len(v) for name, v in heard.metrics.items()}, ledger, weights(release)))
    for lines, counts, ledger, released in ends[1:]:
        assert (lines, counts, ledger) == ends[0][:3]
        assert all(torch.equal(released[name], value) for name, value in ends[0][3].items())


@pytest.mark.parametrize("began", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_torn_ledger_line_counts_and_the_run_stops_within_its_budget(house, monkeypatch, began):
    """The torn line belongs to a step that just began or, which no crash can cause, to a step that was taken."""
    with pytest.raises(Crash):
        run(house, "run", stop_before=3, monkeypatch=monkeypatch)
    path = house / "run" / "ledger.jsonl"
    content = path.read_bytes()
    path.write_bytes(content + content.splitlines()[-1][:70] if began else content[:-40])
    if not began:
        with pytest.raises(InputError, match="line 3 is not the one that was written here"):
            run(house, "run")
        shutil.rmtree(house / ".heads")  # as in a folder that comes from another machine
    heard = Heard()
    statement = read_json(run(house, "run", events=heard) / "privacy.json")
    assert statement["steps"] == 5
    assert statement["epsilon"] <= 10
    assert any("stopped at step 4 of 5" in line for line in heard.lines) is began


@pytest.mark.parametrize("began", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_torn_line_of_a_replay_costs_no_step_and_the_weights_are_an_unbroken_run_s(house, monkeypatch, began):
    seeded = f"{seed_file(house)} train.checkpoint_every=1"
    unbroken = weights(run(house, "unbroken", seeded))
    with pytest.raises(Crash):
        run(house, "run", seeded, stop_before=3, monkeypatch=monkeypatch)
    path = house / "run" / "ledger.jsonl"
    content = path.read_bytes()
    path.write_bytes(content + content.splitlines()[-1][:70] if began else content[:-40])
    if not began:
        with pytest.raises(InputError, match="line 3 is not the one that was written here"):
            run(house, "run", seeded)
        shutil.rmtree(house / ".heads")  # as in a folder that comes from another machine
    heard = Heard()
    release = run(house, "run", seeded, events=heard)
    statement = read_json(release / "privacy.json")
    assert (statement["steps"], statement["epsilon"] <= 10) == (5, True)
    assert not any("stopped" in line for line in heard.lines)
    assert any("keep it secret" in line for line in heard.lines)
    assert all(torch.equal(unbroken[name], value) for name, value in weights(release).items())
