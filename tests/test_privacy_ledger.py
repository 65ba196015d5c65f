"""The ledger counts every step whose noise can have been seen, through crashes and replays."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
from tiny import plan_of

from dp_lora.config import ROOT
from dp_lora.errors import InputError
from dp_lora.privacy.ledger import Ledger
from dp_lora.privacy.randomness import Randomness, read_secret


def test_with_fresh_randomness_a_step_taken_twice_counts_twice(tmp_path):
    ledger, plan = Ledger(tmp_path / "l"), plan_of()
    for step in (0, 1, 1, 2):
        ledger.append(step, plan, replay_of=None)
    assert ledger.counted_steps(plan) == 4


def test_an_exact_replay_counts_once(tmp_path):
    ledger, plan = Ledger(tmp_path / "l"), plan_of()
    for step in (0, 1, 1, 2):
        ledger.append(step, plan, replay_of=f"sum of {step}")
    assert ledger.counted_steps(plan) == 3


def test_one_noise_is_never_added_to_two_different_sums(tmp_path):
    ledger, plan = Ledger(tmp_path / "l"), plan_of()
    ledger.append(0, plan, replay_of="one")
    with pytest.raises(InputError, match="the replay is not exact"):
        ledger.append(0, plan, replay_of="another")
    assert ledger.counted_steps(plan) == 1


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_torn_last_line_counts_as_a_step_and_the_next_one_is_whole(tmp_path, cut):
    ledger, plan = Ledger(tmp_path / "l"), plan_of()
    ledger.append(0, plan, replay_of=None)
    ledger.append(1, plan, replay_of=None)
    content = ledger.path.read_bytes()
    ledger.path.write_bytes(content[: -cut - 1])
    ledger = Ledger(ledger.path)
    assert ledger.counted_steps(plan) == 2
    ledger.append(2, plan, replay_of=None)
    assert ledger.counted_steps(plan) == Ledger(ledger.path).counted_steps(plan) == 3


def test_torn_lines_of_a_replay_are_steps_of_the_plan_and_never_more_than_it_has(tmp_path):
    ledger, plan = Ledger(tmp_path / "l"), plan_of(steps=3)
    ledger.append(0, plan, replay_of="sum of 0")
    for _ in range(2):
        with ledger.path.open("ab") as file:
            file.write(b'{"entry": {"step": 1, \n')
    assert Ledger(ledger.path).counted_steps(plan) == 3
    for step in range(1, 3):
        ledger.append(step, plan, replay_of=f"sum of {step}")
    assert Ledger(ledger.path).counted_steps(plan) == 3


def test_a_changed_line_is_refused(tmp_path):
    ledger, plan = Ledger(tmp_path / "l"), plan_of()
    ledger.append(0, plan, replay_of=None)
    ledger.path.write_text(ledger.path.read_text().replace('"step": 0', '"step": 7'))
    with pytest.raises(InputError, match="line 1: the checksum"):
        Ledger(ledger.path).counted_steps(plan)


def written(path, steps=5, replay=False):
    """The plan of a new ledger, and its lines."""
    ledger, plan = Ledger(path), plan_of()
    for step in range(steps):
        ledger.append(step, plan, replay_of=f"sum of {step}" if replay else None)
    return plan, path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize(
    "order", [[0, 1, 3, 4], [1, 2, 3, 4], [0, 2, 1, 3, 4], [0, 1, 1, 2, 3, 4], [4, 0, 1, 2, 3], [2]]
)
def test_a_line_that_is_missing_moved_or_doubled_in_the_middle_is_refused(tmp_path, order, replay):
    """A mutant that checks each line alone would count fewer steps than were taken."""
    plan, lines = written(tmp_path / "l", replay=replay)
    (tmp_path / "l").write_bytes(b"".join(lines[number] for number in order))
    with pytest.raises(InputError, match="does not follow the line before"):
        Ledger(tmp_path / "l").counted_steps(plan)


def test_a_torn_line_in_the_middle_can_neither_be_removed_nor_changed(tmp_path):
    plan, lines = written(tmp_path / "l", steps=2)
    torn = lines[1][:-20]
    (tmp_path / "l").write_bytes(lines[0] + torn)
    ledger = Ledger(tmp_path / "l")
    ledger.append(2, plan, replay_of=None)
    content = ledger.path.read_bytes()
    assert ledger.counted_steps(plan) == 3
    for other in (content.replace(torn + b"\n", b""), content.replace(torn, torn[:-1])):
        ledger.path.write_bytes(other)
        with pytest.raises(InputError, match="does not follow"):
            Ledger(ledger.path).counted_steps(plan)


def test_a_whole_last_line_without_its_end_is_no_torn_one(tmp_path):
    plan, lines = written(tmp_path / "l", steps=2, replay=True)
    (tmp_path / "l").write_bytes(b"".join(lines)[:-1])
    ledger = Ledger(tmp_path / "l")
    assert ledger.counted_steps(plan) == 2
    ledger.append(1, plan, replay_of="sum of 1")
    assert ledger.counted_steps(plan) == Ledger(ledger.path).counted_steps(plan) == 2


def test_what_another_wrote_is_seen_and_what_was_lost_meanwhile_is_refused(tmp_path):
    ledger, other, plan = Ledger(tmp_path / "l"), Ledger(tmp_path / "l"), plan_of()
    ledger.append(0, plan, replay_of=None)
    assert ledger.counted_steps(plan) == 1
    other.append(1, plan, replay_of=None)
    ledger.append(2, plan, replay_of=None)
    assert ledger.counted_steps(plan) == 3
    ledger.path.unlink()
    with pytest.raises(InputError, match="was shortened"):
        ledger.append(3, plan, replay_of=None)
    assert not ledger.path.exists()


def test_fresh_and_replayed_steps_are_never_in_one_ledger(tmp_path):
    for first, second in (("sum", None), (None, "sum")):
        ledger, plan = Ledger(tmp_path / f"{first}"), plan_of()
        ledger.append(0, plan, replay_of=first)
        with pytest.raises(InputError, match="fresh and replayed"):
            ledger.append(1, plan, replay_of=second)


def test_the_work_of_an_append_does_not_grow_with_the_ledger(tmp_path, monkeypatch):
    """The bytes read are counted, not the time: each line is read once however many there are."""
    from dp_lora.privacy import ledger as module

    taken = []
    real = module._Lines.take
    monkeypatch.setattr(module._Lines, "take", lambda self, line, path: (taken.append(line), real(self, line, path)))
    plan, lines = written(tmp_path / "l", steps=100, replay=True)
    assert len(taken) == 99
    assert Ledger(tmp_path / "l").counted_steps(replace(plan, steps=200)) == 100
    assert len(taken) == 99 + len(lines)


def test_a_full_disk_loses_no_line(tmp_path):
    """A real limit on the file's size: the line that does not fit is an error and is gone, for it has no noise."""
    script = f"""
import resource
from pathlib import Path
from tiny import plan_of
from dp_lora.privacy.ledger import Ledger
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
ledger = Ledger(Path({str(tmp_path / "l")!r}))
for step in range(10):
    ledger.append(step, plan_of(), replay_of=None)
    print(step, flush=True)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "OSError" in done.stderr
    taken = len(done.stdout.split())
    ledger = Ledger(tmp_path / "l")
    assert ledger.path.stat().st_size < 1000
    assert ledger.path.read_bytes().endswith(b"\n")
    assert ledger.counted_steps(plan_of()) == taken >= 1
    ledger.append(taken, plan_of(), replay_of=None)
    assert Ledger(ledger.path).counted_steps(plan_of()) == taken + 1


def test_a_ledger_of_another_plan_is_refused(tmp_path):
    ledger = Ledger(tmp_path / "l")
    ledger.append(0, plan_of(), replay_of=None)
    for change in ({"noise_multiplier": 2.0}, {"sample_rate": 0.1}, {"max_grad_norm": 1.0}):
        for opened in (ledger, Ledger(ledger.path)):
            with pytest.raises(InputError, match="another plan"):
                opened.counted_steps(plan_of(**change))


def test_a_seed_file_that_others_can_read_or_that_is_short_is_refused(tmp_path):
    path = tmp_path / "seed"
    with pytest.raises(InputError, match="cannot be read"):
        read_secret(path)
    path.write_bytes(b"x" * 32)
    path.chmod(0o644)
    with pytest.raises(InputError, match="chmod 600"):
        read_secret(path)
    path.chmod(0o600)
    assert read_secret(path) == b"x" * 32
    path.write_bytes(b"short")
    with pytest.raises(InputError, match="at least 16"):
        read_secret(path)


def test_the_secret_does_not_show_when_randomness_is_printed():
    assert "secret" not in repr(Randomness("run", b"secret-secret-secret"))
