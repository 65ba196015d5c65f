"""Members side by side: a failed member stops no other, a killed study leaves no orphan, no score reaches a log."""

import functools
import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from dp_lora.config import ROOT
from dp_lora.errors import InputError
from dp_lora.files import write_json
from dp_lora.study import member
from dp_lora.study.grid import Grid, read_study
from dp_lora.study.member import last_error
from dp_lora.study.place import LOG, Record, places
from dp_lora.study.result import DONE, FAILED
from dp_lora.study.runner import Local, Task, how_it_ended, run_all
from dp_lora.study.table import Shown, figures, seconds_left, usual_seconds


@dataclass
class Counted:
    """An executor whose tasks end at the second look, with the given statuses."""

    statuses: dict[int, int]
    room: int = 2
    running: dict[int, int] = field(default_factory=dict)
    seen: list[set[int]] = field(default_factory=list)
    closed: bool = False

    def has_room(self):
        return len(self.running) < self.room

    def start(self, task):
        self.running[task.number] = 0
        self.seen.append(set(self.running))

    def ended(self):
        for number in self.running:
            self.running[number] += 1
        over = [number for number, looks in self.running.items() if looks > 1]
        for number in over:
            del self.running[number]
        return {number: self.statuses.get(number, 0) for number in over}

    def close(self):
        self.closed = True


def tasks(*releases):
    return [Task(number, ["true"], release) for number, release in enumerate(releases, 1)]


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr("dp_lora.study.runner.LOOK_EVERY", 0.01)


def test_a_member_that_fails_stops_no_other_one_and_all_are_told():
    executor, ended = Counted({2: 1}), {}
    run_all(tasks("a", "b", "c", "d"), executor, lambda number: None, ended.__setitem__, lambda: None)
    assert ended == {1: 0, 2: 1, 3: 0, 4: 0}
    assert max(map(len, executor.seen)) == 2
    assert executor.closed


def test_members_that_share_a_fine_tuning_wait_for_each_other_and_others_pass_them():
    executor, ended = Counted({}), {}
    run_all(tasks("a", "a", "b"), executor, lambda number: None, ended.__setitem__, lambda: None)
    assert list(ended) == [1, 3, 2]
    assert not any({1, 2} <= together for together in executor.seen)


def test_ctrl_c_ends_what_runs_before_it_is_told():
    executor = Counted({})

    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all(tasks("a"), executor, lambda number: None, lambda number, status: None, stopped)
    assert executor.closed


def alive(pid: int) -> bool:
    try:
        return open(f"/proc/{pid}/stat", encoding="utf-8").read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pid: int) -> bool:
    end = time.monotonic() + 10
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pid)


def test_local_processes_share_the_cores_out_write_logs_and_end_when_they_are_closed(tmp_path):
    script = "import os, sys, time; print(os.environ['OMP_NUM_THREADS'], os.getpid(), flush=True); time.sleep(60)"
    executor = Local(1000, tmp_path / "logs", {"A": "b"})
    executor.start(Task(1, [sys.executable, "-c", script], "a"))
    log = tmp_path / "logs" / "1.txt"
    while not log.read_text(encoding="utf-8").strip():
        time.sleep(0.05)
    threads, pid = log.read_text(encoding="utf-8").split()
    assert threads == "1"
    assert executor.ended() == {}
    executor.close()
    assert gone(int(pid))
    executor = Local(1, tmp_path / "logs", {})
    executor.start(Task(2, ["false"], "a"))
    assert not executor.has_room()
    while not (ended := executor.ended()):
        time.sleep(0.05)
    assert ended == {2: 1}
    assert (how_it_ended(1), how_it_ended(-signal.SIGKILL)) == ("exit status 1", "ended by SIGKILL")


def test_a_tied_process_dies_with_the_one_that_started_it_by_whatever_signal():
    script = """
import os, sys
from dp_lora.tracking.session import start_in_session
child = start_in_session(["sleep", "60"], "/", os.environ, tied=True)
print(child.pid, flush=True)
child.wait()
"""
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert alive(child)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert gone(child)


@pytest.fixture
def members(tmp_path):
    """The members of the smallest study in a folder of the test's own; the first is done."""
    found = [replace(place, folder=tmp_path / str(place.number)) for place in smoke()]
    for place in found:
        place.folder.mkdir()
    record = Record()
    for stage, folder in (("finetune", "finetune"), ("sample", "samples"), ("fid", "evaluation")):
        (found[0].folder / folder).mkdir()
        record = record.with_stage(stage, 10.0, None, None)
    found[0].write(record)
    write_json(found[0].folder / "finetune" / "metrics.json", {"epsilon": 9.99})
    write_json(found[0].folder / "evaluation" / "metrics.json", {"accuracy": 0.875, "fid": None})
    return found


@functools.cache
def smoke():
    """The members of the smallest study."""
    return places(read_study("smoke"))


class Stages:
    """Stand-ins for the stages of a member: each makes its folder; one may fail."""

    def __init__(self, place, monkeypatch):
        self.place, self.made, self.fails = place, [], ""
        monkeypatch.setattr(member, "run_in_session", self._run)
        monkeypatch.setattr(member.tracking, "newest_child", lambda run_id, stage: None)

    def _run(self, command, *_arguments, **_options):
        out = Path(command[command.index("--out") + 1])
        if command[3] == self.fails:
            (self.place.folder / LOG).write_text("error: no room\n", encoding="utf-8")
            return 1
        out.mkdir()
        self.made.append(command[3])
        return 0

    def make(self, base="base", pictures="pictures"):
        """Make the member from these; gives the stages that were run."""
        self.made.clear()
        run = SimpleNamespace(run_id="r", environment=dict)
        audits = {"audit-eps1": {"privacy.eps": "1"}}
        record = member.run_member(self.place, {"base": base, "pictures": pictures}, run, "cpu", audits)
        assert self.place.is_done(record)
        return list(self.made)


WHOLE = ["audit", "finetune", "sample", "fid"]


@pytest.mark.parametrize("changed", ["base", "pictures"])
def test_a_member_is_made_anew_where_base_or_pictures_changed_and_not_otherwise(tmp_path, monkeypatch, changed):
    stages = Stages(replace(smoke()[0], folder=tmp_path / "member"), monkeypatch)
    assert stages.make() == WHOLE
    assert stages.make() == []
    (tmp_path / "member/evaluation").rmdir()
    assert stages.make() == ["fid"]
    (tmp_path / "member/finetune/left").touch()
    assert stages.make(**{changed: "other"}) == WHOLE
    assert not (tmp_path / "member/finetune/left").exists()
    assert stages.make(**{changed: "other"}) == []


def test_a_stage_that_fails_leaves_its_line_and_the_next_call_goes_on_there(tmp_path, monkeypatch):
    stages = Stages(replace(smoke()[0], folder=tmp_path / "member"), monkeypatch)
    stages.fails = "sample"
    with pytest.raises(InputError, match=r"sample: no room; .* has all that it said") as error:
        stages.make()
    assert error.value.public == "sample: exit status 1"
    outcome = stages.place.outcome()
    assert (outcome.state, outcome.reason, stages.made) == (FAILED, "sample: exit status 1", WHOLE[:2])
    stages.fails = ""
    assert stages.make() == WHOLE[2:]
    assert stages.place.outcome().state == DONE


def test_changed_code_and_changed_settings_give_a_member_another_folder(monkeypatch):
    grid = Grid("smoke", "", (smoke()[0].member,))
    other = replace(grid.members[0], settings={**grid.members[0].settings, "train.lr": "0.5"})
    (before,) = places(grid)
    assert places(grid)[0].folder == before.folder
    assert places(replace(grid, members=(other,)))[0].folder != before.folder
    monkeypatch.setattr("dp_lora.study.place.digest_code", lambda *files: "other")
    assert places(grid)[0].folder != before.folder


@pytest.mark.parametrize(("device", "gpus"), [("cpu, 2 threads", 0), ("NVIDIA H100", 1), ("", 0)])
def test_gpu_hours_count_the_gpus_of_a_member_that_ran_on_some(members, device, gpus):
    members[0].write(replace(members[0].read(), device=device))
    assert members[0].outcome().gpus == gpus


def test_scores_are_drawn_on_a_terminal_and_stand_in_no_line(members):
    from rich.console import Console

    lines = []
    shown = Shown(members, lines.append)
    shown.started(1)
    shown.ended(1, "")
    shown.started(2)
    shown.ended(2, "finetune: no room")
    shown.started(3)
    assert [line.split(": ", 1)[0] for line in lines[:2]] == ["[1/3] eps=10 seed=0", "[1/3] eps=10 seed=0"]
    assert lines[3].endswith(": finetune: no room")
    assert not any("0.875" in line or "accuracy" in line for line in lines)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(shown._draw())
    first, failed, running = console.export_text().splitlines()[1:]
    assert "accuracy 0.875" in first
    assert "epsilon 9.99" in first
    assert "failed" in failed
    assert "no room" in failed
    assert "running" in running
    assert "30 seconds" in running  # the finished member took so long
    assert figures(members[0].outcome()) == {"epsilon": "9.99", "accuracy": "0.875"}


def test_time_left_is_that_of_the_last_bar_and_of_the_usual_stages(members):
    usual = usual_seconds([place.read() for place in members])
    assert usual == {"finetune": 10.0, "sample": 10.0, "fid": 10.0}
    place = members[1]
    (place.folder / LOG).write_text("DP-SGD:   1%|#| 00:01<?\rDP-SGD:  50%|#####     | 01:40<01:40\r", encoding="utf-8")
    assert seconds_left(place, Record(), usual) == 120.0
    assert seconds_left(place, Record(), {}) is None


def test_the_line_of_a_failure_is_the_last_error_of_a_log(tmp_path):
    log = tmp_path / "log.txt"
    assert last_error(log) == ""
    log.write_text("error: first\nerror: second: no\nafter\n", encoding="utf-8")
    assert last_error(log) == "second: no"
