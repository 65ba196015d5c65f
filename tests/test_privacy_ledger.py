"""The ledger counts every step whose noise can have been seen, through crashes and replays."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from dp_lora.config import ROOT
from dp_lora.errors import InputError
from dp_lora.privacy import ledger as ledger_module
from dp_lora.privacy.heads import Head, Heads
from dp_lora.privacy.ledger import Ledger
from dp_lora.privacy.randomness import Randomness, read_secret
from tests.support.tiny import plan_of


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
    with pytest.raises(InputError, match="does not follow the lines before"):
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


def test_lines_before_a_torn_one_can_be_neither_removed_nor_changed(tmp_path):
    """With a short torn line, a mutant whose lines know only the line before counts fewer steps."""
    _, lines = written(tmp_path / "l", steps=2)
    torn = lines[1][:12]
    (tmp_path / "l").write_bytes(lines[0] + torn)
    ledger, plan = Ledger(tmp_path / "l"), plan_of()
    ledger.append(2, plan, replay_of=None)
    assert ledger.counted_steps(plan) == 3
    content = ledger.path.read_bytes()
    for other in (content.removeprefix(lines[0]), torn + b"\n" + content):
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
    """The test counts the bytes read, not the time: each line is read once, however long the ledger is."""
    from dp_lora.privacy import ledger as module

    taken = []
    real = module._Lines.take
    monkeypatch.setattr(module._Lines, "take", lambda self, line, path: (taken.append(line), real(self, line, path)))
    plan, lines = written(tmp_path / "l", steps=100, replay=True)
    assert len(taken) == 99
    assert Ledger(tmp_path / "l").counted_steps(replace(plan, steps=200)) == 100
    assert len(taken) == 99 + len(lines)


def test_a_full_disk_loses_no_line(tmp_path):
    """A real limit on the file's size: a line that does not fit is an error, and is removed, for it has no noise."""
    script = f"""
import resource
from pathlib import Path
from tests.support.tiny import plan_of
from dp_lora.privacy.ledger import Ledger
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
ledger = Ledger(Path({str(tmp_path / "l")!r}))
for step in range(10):
    ledger.append(step, plan_of(), replay_of=None)
    print(step, flush=True)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
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


def seen(folder, name="l"):
    """Open a ledger as a process does; this place keeps its heads."""
    heads = Heads(folder / ".heads" / "id")
    heads.make()
    return Ledger(folder / name, heads)


def take(ledger, *steps, replay=False):
    for step in steps:
        ledger.append(step, plan_of(), replay_of=f"sum of {step}" if replay else None)


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("left", [0, 1, 2, None])
def test_an_older_copy_of_a_ledger_is_refused_and_the_newest_goes_on(tmp_path, left, replay):
    """`None` stands for no file. A mutant that keeps no heads repeats steps that it has already counted."""
    take(seen(tmp_path), 0, 1, 2, replay=replay)
    content = (tmp_path / "l").read_bytes()
    (tmp_path / "l").write_bytes(b"".join(content.splitlines(keepends=True)[:left]))
    if left is None:
        (tmp_path / "l").unlink()
    for refused in (lambda: seen(tmp_path).counted_steps(plan_of()), lambda: take(seen(tmp_path), 3, replay=replay)):
        with pytest.raises(InputError, match=f"holds {left or 0} lines, but 3 were written here"):
            refused()
    (tmp_path / "l").write_bytes(content)
    take(seen(tmp_path), 3, replay=replay)
    assert seen(tmp_path).counted_steps(plan_of()) == 4


@pytest.mark.parametrize("more", [0, 1, 2])
def test_another_branch_of_a_ledger_is_refused_though_it_has_as_many_lines_or_more(tmp_path, more):
    """A mutant that compares the numbers of lines alone continues both branches."""
    take(seen(tmp_path), 0, 1)
    shutil.copy(tmp_path / "l", tmp_path / "copy")
    take(Ledger(tmp_path / "copy"), *range(2, 4 + more))  # at a place that keeps no heads
    take(seen(tmp_path), 2, 3)
    with pytest.raises(InputError, match="line 4 is not the one that was written here"):
        seen(tmp_path, "copy").counted_steps(plan_of())
    assert seen(tmp_path).counted_steps(plan_of()) == 4


def test_a_ledger_that_went_on_elsewhere_is_accepted_and_what_it_was_here_no_longer(tmp_path):
    take(seen(tmp_path), 0, 1)
    here = (tmp_path / "l").read_bytes()
    take(Ledger(tmp_path / "l"), 2)
    assert seen(tmp_path).counted_steps(plan_of()) == 3
    take(seen(tmp_path), 3)
    (tmp_path / "l").write_bytes(here)
    with pytest.raises(InputError, match="holds 2 lines, but 4 were"):
        seen(tmp_path).counted_steps(plan_of())


def test_the_line_is_on_the_disk_before_its_head(tmp_path, monkeypatch):
    found = []
    real = Heads.append
    spy = lambda self, head: (found.append(((tmp_path / "l").read_bytes().count(b"\n"), head.lines)), real(self, head))  # noqa: E731
    monkeypatch.setattr(Heads, "append", spy)
    take(seen(tmp_path), 0, 1, 2)
    assert found == [(1, 1), (2, 2), (3, 3)]


def test_a_crash_between_line_and_head_counts_the_line_and_goes_on(tmp_path, monkeypatch):
    """A mutant that writes the head first knows of a line that the ledger never got, and refuses to go on."""
    take(seen(tmp_path), 0)
    with monkeypatch.context() as patched:
        patched.setattr(Heads, "append", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            take(seen(tmp_path), 1)
    with monkeypatch.context() as patched:
        patched.setattr(ledger_module, "append_line", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            take(seen(tmp_path), 2)
    assert seen(tmp_path).counted_steps(plan_of()) == 2
    take(seen(tmp_path), 1)
    assert seen(tmp_path).counted_steps(plan_of()) == 3


@pytest.mark.parametrize("of", ["head", "line", "both"])
def test_torn_in_a_crash_at_any_byte_the_ledger_goes_on(tmp_path, of):
    """The states after a kill: a torn line has no head yet; the head of a whole line is torn or missing."""
    take(seen(tmp_path), 0, 1)
    ledger, heads = tmp_path / "l", tmp_path / ".heads" / "id"
    line, head = (path.read_bytes().splitlines(keepends=True)[-1] for path in (ledger, heads))
    lines, others = ledger.read_bytes()[: -len(line)], heads.read_bytes()[: -len(head)]
    for cut in range(2 if of == "both" else 1, len(line) if of == "line" else len(head), 7):
        ledger.write_bytes(lines + (line[:-cut] if of == "line" else line))
        heads.write_bytes(others + (b"" if of == "line" else head[:-cut]))
        if of == "both":  # the next process is killed too
            ledger.write_bytes(lines + line + line[:-cut])
        counted = seen(tmp_path).counted_steps(plan_of())
        assert counted == (3 if of == "both" else 2)
        take(seen(tmp_path), 2)
        assert seen(tmp_path).counted_steps(plan_of()) == counted + 1
        assert seen(tmp_path).heads.last().lines == counted + 1


def test_heads_are_their_owner_s_alone(tmp_path):
    take(seen(tmp_path), 0)
    assert (tmp_path / ".heads").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / ".heads" / "id").stat().st_mode & 0o777 == 0o600


def test_two_branches_have_two_heads_and_one_ledger_has_one(tmp_path):
    """A mutant whose lines name no process gives all ledgers of a plan one head."""
    plan = plan_of()
    take(Ledger(tmp_path / "l"), 0, 1)
    shutil.copy(tmp_path / "l", tmp_path / "copy")
    assert Ledger(tmp_path / "l").head(plan) == Ledger(tmp_path / "copy").head(plan)
    take(Ledger(tmp_path / "l"), 2)
    take(Ledger(tmp_path / "copy"), 2)
    take(Ledger(tmp_path / "other"), 0, 1, 2)
    assert len({Ledger(tmp_path / name).head(plan) for name in ("l", "copy", "other")}) == 3


def test_a_replay_s_head_is_that_of_its_sums_however_often_it_was_stopped(tmp_path):
    plan = plan_of()
    for name, steps in (("whole", (0, 1, 2)), ("stopped", (0, 1, 1, 0, 1, 2)), ("less", (0, 1))):
        take(Ledger(tmp_path / name), *steps, replay=True)
    whole, stopped, less = (Ledger(tmp_path / name).head(plan) for name in ("whole", "stopped", "less"))
    assert whole == stopped != less
    other = Ledger(tmp_path / "other")
    for step in range(3):
        other.append(step, plan, replay_of=f"another sum of {step}")
    assert other.head(plan) != whole


def test_a_line_of_fresh_randomness_holds_public_numbers_and_a_random_id_and_nothing_else(tmp_path):
    """A head is published, so it must not help anybody to test who takes part."""
    take(Ledger(tmp_path / "l"), 0)
    entry = json.loads((tmp_path / "l").read_text())["entry"]
    assert len(entry.pop("process")) == 32
    plan = plan_of()
    numbers = {name: getattr(plan, name) for name in ("sample_rate", "noise_multiplier", "max_grad_norm", "clipping")}
    assert entry == {"step": 0, "randomness": "fresh", "chain": "", **numbers}


def test_ledgers_of_before_the_chain_are_read(tmp_path):
    """Their counts stay valid; but a run cannot resume in a folder with one, for other code began it."""
    before = ""
    with (tmp_path / "l").open("w") as file:
        for step in range(3):
            entry = {"step": step, "sample_rate": 0.5, "noise_multiplier": 1.0, "max_grad_norm": 0.1}
            entry |= {"randomness": "fresh", "before": before}
            line = json.dumps({"entry": entry, "crc32": ledger_module._checksum(entry)}, sort_keys=True)
            before = hashlib.sha256(line.encode()).hexdigest()
            file.write(f"{line}\n")
    ledger = Ledger(tmp_path / "l")
    assert ledger.counted_steps(plan_of()) == 3
    take(ledger, 3)
    lines = (tmp_path / "l").read_bytes().splitlines(keepends=True)
    for order, words in (([0, 1, 2, 3], None), ([0, 2, 3], "does not follow"), ([0, 1, 3], "does not follow")):
        (tmp_path / "l").write_bytes(b"".join(lines[number] for number in order))
        if words is None:
            assert Ledger(tmp_path / "l").counted_steps(plan_of()) == 4
        else:
            with pytest.raises(InputError, match=words):
                Ledger(tmp_path / "l").counted_steps(plan_of())


def test_processes_that_write_at_once_lose_no_head(tmp_path):
    script = """
import sys
from pathlib import Path
from dp_lora.privacy.heads import Heads
from dp_lora.privacy.ledger import Ledger
from dp_lora.privacy.plan import PrivacyPlan
folder, name = Path(sys.argv[1]), sys.argv[2]
plan = PrivacyPlan(0.5, 1.0, 0.1, 10, 4.0, 1e-3, 5.0, 1, "picture")
heads = Heads(folder / ".heads" / name)
heads.make()
ledger = Ledger(folder / name, heads)
for step in range(60):
    ledger.append(step, plan, replay_of=None)
"""
    names = ("a", "b", "c")
    running = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path), name]) for name in names]
    assert [process.wait() for process in running] == [0, 0, 0]
    for name in names:
        heads = Heads(tmp_path / ".heads" / name)
        ledger = Ledger(tmp_path / name, heads)
        assert ledger.counted_steps(plan_of()) == 60
        assert heads.last() == Head(60, ledger.head(plan_of()))
        lines = ledger.path.read_bytes().splitlines(keepends=True)
        ledger.path.write_bytes(b"".join(lines[:59]))
        with pytest.raises(InputError, match="59 lines, but 60"):
            Ledger(ledger.path, heads).counted_steps(plan_of())


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
