"""A study as an array of Slurm jobs, with stand-ins for Slurm: sending, following, cancelling and gathering."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from dp_lora.cli import study_run
from dp_lora.errors import InputError
from dp_lora.slurm import waiting
from dp_lora.slurm.settings import Environment, Settings
from dp_lora.study import array
from dp_lora.study.grid import read_study
from dp_lora.study.place import RESULTS, Record, places
from dp_lora.tracking.process import Terminated

SETTINGS = Settings(Environment("venv", sys.prefix), partition="gpu")
# one state for all jobs; a file named after a job holds that job's own state
SCONTROL = """
cd {here}
[ -e away ] && {{ echo "error: Unable to contact slurm controller (connect failure)" >&2; exit 1; }}
[ "$*" = "show config" ] && {{ echo "ClusterName = one"; exit; }}
echo "JobId=7 JobState=$(cat state_$4 2>/dev/null || cat state) ExitCode=1:0 Comment=run Restarts=0"
"""
SBATCH = """
cd {here}
number=$(( $(cat last 2>/dev/null || echo 6) + 1 )); echo $number > last
printf "%s\\n" "$@" > given_$number; cp "${{@: -1}}" script_$number
echo "$OF_A_RUN $DPLORA_JOB_OF" > run_$number; echo $number
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Stand-ins for Slurm, the smallest study in a folder of its own, and a clock with short seconds."""
    here = tmp_path / "slurm"
    here.mkdir()
    texts = {
        "scontrol": SCONTROL,
        "sbatch": SBATCH,
        "scancel": "cd {here}; echo $1 >> cancelled; echo CANCELLED > state",
    }
    for name, text in texts.items():
        (here / name).write_text("#!/bin/bash\n" + text.format(here=here))
        (here / name).chmod(0o755)
    (here / "state").write_text("PENDING")
    monkeypatch.setenv("PATH", f"{here}:{os.environ['PATH']}")
    monkeypatch.setattr(array, "study_folder", lambda name: tmp_path / name)
    for module, names in ((waiting, ("SHORTEST", "LONGEST")), (array, ("LOOK_EVERY", "SETTLING"))):
        for name in names:
            monkeypatch.setattr(module, name, 0.01)
    grid = read_study("smoke")
    found = [replace(place, folder=tmp_path / "smoke" / place.folder.name) for place in places(grid)]
    return SimpleNamespace(here=here, grid=grid, places=found, logs=tmp_path / "smoke" / "logs")


def send(site, *, upstream=False):
    return array.send(site.grid, site.places, SETTINGS, 2, "run", {"OF_A_RUN": "secret"}, upstream=upstream)


def make(place):
    """Write the files that a finished member leaves."""
    record = Record()
    for stage, name in RESULTS.items():
        (place.folder / name).mkdir(parents=True)
        record = record.with_stage(stage, 1.0, None, None)
    place.write(record)


def follow(site, sent, look=lambda: None):
    began, ended, said = [], {}, []
    array.follow(
        sent, site.places, site.logs, lambda place: place.is_done(place.read()), began.append, ended.__setitem__, look,
        said.append,
    )  # fmt: skip
    return began, ended, said


def test_members_are_an_array_that_begins_after_the_job_of_base_and_pictures(site):
    sent = send(site, upstream=True)
    assert (sent.upstream, sent.array, sent.cluster) == ("7", "8", "one")
    given = (site.here / "given_8").read_text().splitlines()
    assert {"--dependency=afterok:7", "--comment=run", "--export=ALL"} <= {*given}
    script = (site.here / "script_8").read_text()
    assert "#SBATCH --array=0-2%2\n" in script
    assert "#SBATCH --job-name=dp-lora-study\n" in script
    assert "--member 3" in script
    assert "--upstream" in (site.here / "script_7").read_text()
    # Slurm passes the environment on; the script must name none of it
    assert (site.here / "run_8").read_text() == "secret run\n"
    assert "secret" not in script
    alone = send(site)
    assert (alone.upstream, alone.array) == ("", "9")
    assert not any("dependency" in word for word in (site.here / "given_9").read_text().splitlines())


def test_the_run_of_a_study_keeps_the_scripts_of_its_jobs(site, monkeypatch):
    monkeypatch.setattr(study_run, "is_upstream_made", lambda grid, found: False)
    kept = {}
    run = SimpleNamespace(run_id="run", environment=dict, text=lambda text, file: kept.update({file: text}))
    study_run._send(site.grid, site.places, 2, SETTINGS, run)
    expected = {
        f"slurm/{name}.sh": (site.here / f"script_{n}").read_text() for name, n in (("upstream", 7), ("members", 8))
    }
    assert kept == expected


def test_an_array_that_is_refused_takes_the_job_of_base_and_pictures_with_it(site):
    text = (site.here / "sbatch").read_text()
    refused = '[ -e last ] && { echo "sbatch: error: Invalid account" >&2; exit 1; }\n'
    (site.here / "sbatch").write_text(text.replace("number=", refused + "number="))
    with pytest.raises(InputError, match="Invalid account"):
        send(site, upstream=True)
    assert (site.here / "cancelled").read_text() == "7\n"
    assert array.read_sent("smoke", site.places) is None


def test_members_that_share_a_ledger_are_one_task_in_which_each_fails_alone(site, tmp_path):
    first, second, third = site.places
    shares = replace(third, member=first.member, config=first.config)
    assert array.tasks_of([first, second, shares]) == [[first, shares], [second]]
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "python").write_text('#!/bin/bash\necho "$@"; [[ "$*" == *"--member 3" ]]\n')
    (fake / "python").chmod(0o755)
    logs = tmp_path / "o'logs"
    logs.mkdir()
    line = array.task_line(site.grid, [first, shares], logs)
    environment = {**os.environ, "PATH": f"{fake}:{os.environ['PATH']}"}
    assert subprocess.run(["bash", "-c", line], env=environment, check=False).returncode == 1
    assert [(logs / f"{number}.txt").read_text().split()[-1] for number in (1, 3)] == ["1", "3"]
    # a single member replaces the shell, so that Slurm's signals reach it
    assert shlex.split(array.task_line(site.grid, [second], logs))[:2] == ["exec", "python"]


@pytest.mark.parametrize(("signal", "status"), [("USR1", 130), ("TERM", 143)])
def test_a_task_of_several_members_passes_a_signal_on_and_begins_no_other_member(site, tmp_path, signal, status):
    fake = tmp_path / "bin"
    fake.mkdir()
    stopped = f"trap 'echo kept; exit {status}' {signal}; kill -{signal} $PPID; for n in $(seq 100); do sleep 0.1; done"
    (fake / "python").write_text(f"#!/bin/bash\n{stopped}\n")
    (fake / "python").chmod(0o755)
    line = array.task_line(site.grid, site.places[:2], tmp_path)
    environment = {**os.environ, "PATH": f"{fake}:{os.environ['PATH']}"}
    assert subprocess.run(["bash", "-c", line], env=environment, check=False, timeout=60).returncode == status
    assert (tmp_path / "1.txt").read_text() == "kept\n"
    assert not (tmp_path / "2.txt").exists()


def test_places_say_what_was_made_and_logs_or_slurm_why_not(site):
    sent = send(site)
    for number, state in enumerate(("COMPLETED", "FAILED", "TIMEOUT")):
        (site.here / f"state_{sent.array}_{number}").write_text(state)
    (site.logs / "1.txt").touch()
    (site.logs / "2.txt").write_text("error: finetune: no room\n")
    make(site.places[0])
    began, ended, _ = follow(site, sent)
    assert began == [1, 2]
    reason = "Slurm: stopped at its time limit (TIMEOUT)"
    assert ended == {1: "", 2: "finetune: no room", 3: reason}


def test_of_a_shared_task_the_first_member_is_told_when_the_second_begins(site):
    names = [place.folder.name for place in site.places]
    sent = replace(send(site), tasks=[names])
    (site.here / "state").write_text("RUNNING")
    looks = []

    def look():
        looks.append((began.copy(), ended.copy()))
        if len(looks) == 1:
            (site.logs / "1.txt").write_text("error: no\n")
            (site.logs / "2.txt").touch()
        elif ended:
            (site.here / "state").write_text("FAILED")

    began, ended = [], {}
    array.follow(
        sent, site.places, site.logs, lambda place: False, began.append, ended.__setitem__, look, lambda line: None
    )
    assert ([1, 2], {1: "no"}) in looks
    assert {*ended} == {1, 2, 3}


def test_a_controller_that_goes_away_is_one_line_and_ends_no_wait(site):
    sent = send(site)
    (site.here / "state").write_text("COMPLETED")
    (site.here / "away").touch()
    for place in site.places:
        make(place)
    looks = []

    def look():
        looks.append(1)
        if len(looks) == 3:
            (site.here / "away").unlink()

    _, ended, said = follow(site, sent, look)
    assert ended == {1: "", 2: "", 3: ""}
    (line,) = said
    assert "controller is away" in line
    assert "the jobs go on" in line


@pytest.mark.parametrize(
    ("error", "how", "cancelled"),
    [
        (KeyboardInterrupt(), "cancel", True),
        (Terminated("SIGTERM"), "cancel", True),
        (Terminated("SIGHUP"), "cancel", False),
        (KeyboardInterrupt(), "leave", False),
    ],
)
def test_ctrl_c_cancels_the_jobs_or_leaves_them_to_a_second_call(site, error, how, cancelled):
    sent = send(site, upstream=True)
    with (
        pytest.raises(KeyboardInterrupt) as raised,
        array.ends_with_caller("smoke", sent, replace(SETTINGS, on_interrupt=how)),
    ):
        raise error
    (note,) = raised.value.__notes__
    assert ("cancelled" in note) == cancelled
    assert (site.here / "cancelled").exists() == cancelled
    assert (array.read_sent("smoke", site.places) is None) == cancelled
    if cancelled:
        assert (site.here / "cancelled").read_text().split() == ["7", "8"]


def test_a_second_call_sends_nothing_beside_the_array_of_the_first(site):
    sent = send(site)
    kept = {}
    run = SimpleNamespace(run_id="other", environment=dict, text=lambda text, file: kept.update({file: text}))
    assert vars(study_run._send(site.grid, site.places, 1, SETTINGS, run)) == vars(sent)
    assert (site.here / "last").read_text() == "7\n"
    # each call's run shows the script
    assert kept == {"slurm/members.sh": (site.here / "script_7").read_text()}
    with pytest.raises(InputError, match="its array 7 is in the queue; wait for it with slurm"):
        array.refuse_beside("smoke", site.places)
    with pytest.raises(InputError, match="other settings or code"):
        array.read_sent("smoke", site.places[:2])
    path = site.logs.parent / array.SENT
    path.write_text(json.dumps(vars(replace(sent, cluster="two"))))
    with pytest.raises(InputError, match="in the queue of the cluster two"):
        array.read_sent("smoke", site.places)
    path.write_text(json.dumps(vars(sent)))
    (site.here / "state").write_text("COMPLETED")
    assert array.read_sent("smoke", site.places[:2]) is None
    assert not path.exists()


def test_base_or_pictures_that_fail_end_the_study_in_one_line_with_nothing_in_the_queue(site):
    sent = send(site, upstream=True)
    (site.here / "state").write_text("FAILED")
    (site.logs / "upstream.txt").write_text("error: /secret: no pictures\n")
    with pytest.raises(InputError, match="base and pictures: /secret: no pictures; ") as error:
        array.wait_for_upstream("smoke", sent, lambda line: None)
    assert error.value.public == "base and pictures: Slurm: FAILED, exit status 1"
    assert (site.here / "cancelled").read_text() == f"{sent.array}\n"
    assert array.read_sent("smoke", site.places) is None


def test_a_backend_config_that_cannot_be_read_or_is_too_small_is_named(site, tmp_path):
    path = tmp_path / "slurm.json"
    with pytest.raises(InputError, match="cannot be read"):
        array.settings_of(str(path))
    path.write_text("[]")
    with pytest.raises(InputError, match="must be an object"):
        array.settings_of(str(path))
    path.write_text('{"gpus": 1}')
    config = replace(site.places[0].config, compute=replace(site.places[0].config.compute, device="cuda", devices=2))
    with pytest.raises(InputError, match="asks for 1 GPUs a machine"):
        array.check_members([replace(site.places[0], config=config)], array.settings_of(str(path)))
