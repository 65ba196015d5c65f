"""After kill -9 at random moments and a resume, the ledger never counts fewer steps than noises drawn."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from dp_lora.config import ROOT
from dp_lora.privacy.heads import Heads
from dp_lora.privacy.ledger import Ledger
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.training.checkpoints import load_checkpoint
from tests.support.tiny import make_base, tiny_config

LONG = "privacy.epochs=8 train.checkpoint_every=3"


def start(house, overrides, *end):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.kill_target", str(house), overrides, *end]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def counted(house):
    plan = PrivacyPlan.from_json(json.loads((house / "run" / "plan.json").read_text())["plan"])
    return Ledger(house / "run" / "ledger.jsonl").counted_steps(plan), plan


def drawn(house):
    path = house / "drawn"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.slow
def test_kill_9_at_ten_random_instants_never_loses_a_counted_step(tmp_path):
    make_base(tmp_path / "base", tiny_config())
    ledger = tmp_path / "run" / "ledger.jsonl"
    rng, long = random.Random(0), LONG.replace("epochs=8", "epochs=100")
    for _ in range(10):
        process = start(tmp_path, long)
        assert process.stdout.readline() == "ready\n"
        before = ledger.stat().st_size if ledger.exists() else 0
        while not ledger.exists() or ledger.stat().st_size == before:  # until it takes steps
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.5))
        assert process.poll() is None
        process.kill()
        process.wait()
        steps, plan = counted(tmp_path)
        assert 0 < drawn(tmp_path) <= steps < plan.steps
    assert counted(tmp_path)[0] >= 20
    finished_within_budget(tmp_path, long)


def finished_within_budget(house, overrides=LONG):
    """Resume to the end, and check that the ledger counts every noise ever drawn."""
    assert start(house, overrides).wait() == 0
    steps, plan = counted(house)
    assert drawn(house) <= steps <= plan.steps
    statement = json.loads((house / "run" / "release" / "privacy.json").read_text())
    assert (statement["steps"], statement["epsilon"] <= plan.target_epsilon) == (steps, True)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_kill_9_inside_a_checkpoint_s_rename_leaves_whole_checkpoints_and_every_step_counted(tmp_path, when):
    make_base(tmp_path / "base", tiny_config())
    for _ in range(2):
        assert start(tmp_path, LONG, f"{when} 2").wait() == -signal.SIGKILL
        steps, _ = counted(tmp_path)
        assert drawn(tmp_path) <= steps
        step, _, tensors = load_checkpoint(tmp_path / "run" / "checkpoints")
        assert 0 < step <= steps
        assert all(tensor.isfinite().all() for tensor in tensors.values())
    finished_within_budget(tmp_path)


@pytest.mark.slow
def test_kill_9_inside_a_ledger_s_line_its_head_and_between_them_goes_on_with_every_step_counted(tmp_path):
    """A mutant that writes the head first cannot resume after `between`: it misses a line that was never written."""
    make_base(tmp_path / "base", tiny_config())
    heads = tmp_path / ".heads"
    for kills, (end, lines) in enumerate((("line 3", 3), ("between 2", 5), ("head 2", 7)), start=1):
        assert start(tmp_path, LONG, end).wait() == -signal.SIGKILL
        assert counted(tmp_path)[0] == lines
        assert drawn(tmp_path) == lines - kills  # each kill leaves one line without noise
        (known,) = heads.iterdir()
        assert Heads(known).last().lines == lines - 1
    finished_within_budget(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("size", [600, 2500])
def test_a_full_disk_loses_nothing(tmp_path, size):
    """A real limit on file sizes: the ledger's second line, or a checkpoint, does not fit."""
    make_base(tmp_path / "base", tiny_config())
    assert start(tmp_path, LONG, "before 3").wait() == -signal.SIGKILL
    checkpoints = tmp_path / "run" / "checkpoints"
    before = {path.name: path.read_bytes() for path in checkpoints.iterdir()}
    lines = (tmp_path / "run" / "ledger.jsonl").read_bytes()
    steps, _ = counted(tmp_path)
    full = start(tmp_path, LONG, f"disk {len(lines) + size}")
    assert full.wait() not in (0, -signal.SIGKILL)
    assert {path.name: path.read_bytes() for path in checkpoints.iterdir()} == before
    assert (tmp_path / "run" / "ledger.jsonl").read_bytes().startswith(lines)
    assert steps < counted(tmp_path)[0]
    assert drawn(tmp_path) <= counted(tmp_path)[0]
    finished_within_budget(tmp_path)


@pytest.mark.slow
def test_a_second_process_on_one_run_is_refused_and_the_first_goes_on(tmp_path):
    make_base(tmp_path / "base", tiny_config())
    first = start(tmp_path, LONG)
    assert first.stdout.readline() == "ready\n"
    while not (tmp_path / "run/ledger.jsonl").exists():
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # else it may end before the second one starts
    assert start(tmp_path, LONG).wait() == 1
    first.send_signal(signal.SIGCONT)
    assert first.wait() == 0
    steps, plan = counted(tmp_path)
    assert drawn(tmp_path) == steps == plan.steps


@pytest.mark.slow
def test_a_reproducible_run_killed_and_resumed_equals_an_unbroken_one_bit_for_bit(tmp_path):
    seed = tmp_path / "seed"
    seed.write_bytes(b"s" * 32)
    seed.chmod(0o600)
    overrides = f"{LONG} privacy.reproducible=true privacy.seed_file={seed}"
    for name in ("killed", "unbroken"):
        (tmp_path / name).mkdir()
        make_base(tmp_path / name / "base", tiny_config())
    for wait in (0.7, 1.9):
        process = start(tmp_path / "killed", overrides)
        assert process.stdout.readline() == "ready\n"
        time.sleep(wait)
        process.kill()
        process.wait()
    assert start(tmp_path / "killed", overrides).wait() == 0
    assert start(tmp_path / "unbroken", overrides).wait() == 0
    weights = "run/release/peft/adapter_model.safetensors"
    a, b = (load_file(tmp_path / name / weights) for name in ("killed", "unbroken"))
    assert all(torch.equal(a[key], b[key]) for key in b)
    steps, plan = counted(tmp_path / "killed")
    assert steps == plan.steps
