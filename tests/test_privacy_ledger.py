"""The ledger counts every step whose noise can have been seen, through crashes and replays."""

import pytest
from tiny import plan_of

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
    assert ledger.counted_steps(plan) == 2
    ledger.append(2, plan, replay_of=None)
    assert ledger.counted_steps(plan) == 3


def test_a_changed_line_is_refused(tmp_path):
    ledger, plan = Ledger(tmp_path / "l"), plan_of()
    ledger.append(0, plan, replay_of=None)
    ledger.path.write_text(ledger.path.read_text().replace('"step": 0', '"step": 7'))
    with pytest.raises(InputError, match="line 1: the checksum"):
        ledger.counted_steps(plan)


def test_a_ledger_of_another_plan_is_refused(tmp_path):
    ledger = Ledger(tmp_path / "l")
    ledger.append(0, plan_of(), replay_of=None)
    with pytest.raises(InputError, match="another plan"):
        ledger.counted_steps(plan_of(noise_multiplier=2.0))


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
