"""Jobs of Slurm: the settings that a site may fill in, and the batch scripts made of them."""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from dp_lora.config import ROOT
from dp_lora.errors import InputError
from dp_lora.slurm.array import submit_array
from dp_lora.slurm.script import Ranks, array_script, job_script
from dp_lora.slurm.settings import KEYS, Environment, Settings, read_settings

VENV = Environment("venv", "/shared/a place/.venv")
VARIABLES = {"MLFLOW_RUN_ID": "a" * 32, "MLFLOW_EXPERIMENT_ID": "1"}
COMMAND = "python -m entrypoints.finetune --config mnist5k --overrides 'a b'"


def script(settings: Settings | None = None, ranks: Ranks = Ranks(), command: str = COMMAND) -> str:  # noqa: B008
    return job_script(settings or Settings(VENV), "finetune", command, ranks, VARIABLES)


def test_a_script_asks_for_what_the_backend_config_says_and_for_nothing_else():
    settings = Settings(
        VENV, "gpu", "project1", "a100:2", 8, "64G", "12:00:00", "a100|h100", ("--qos=long",), signal=300
    )
    assert [line for line in script(settings).splitlines() if line.startswith("#SBATCH")] == [
        "#SBATCH --job-name=dp-lora-finetune",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=project1",
        "#SBATCH --nodes=1",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --gres=gpu:a100:2",
        "#SBATCH --mem=64G",
        "#SBATCH --time=12:00:00",
        "#SBATCH --constraint=a100|h100",
        "#SBATCH --signal=B:USR1@300",
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
        "#SBATCH --qos=long",
    ]
    assert [line for line in script().splitlines() if line.startswith("#SBATCH")] == [
        "#SBATCH --job-name=dp-lora-finetune",
        "#SBATCH --nodes=1",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --signal=B:USR1@120",
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
    ]
    assert "#SBATCH --no-requeue" in script(Settings(VENV, requeue=False))


def test_a_script_names_the_run_and_no_variable_of_the_caller(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:password@host")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    text = script()
    assert f"export MLFLOW_RUN_ID={'a' * 32}\n" in text
    assert "password" not in text
    assert "secret" not in text


def test_several_ranks_are_started_by_srun_and_only_the_first_has_the_run():
    text = script(ranks=Ranks(4, 2))
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=4\n" in text
    (line,) = [line for line in text.splitlines() if line.startswith("srun ")]
    assert shlex.split(line)[:3] == ["srun", "bash", "-c"]
    assert "unset MLFLOW_RUN_ID" in line
    assert "GLOO_SOCKET_IFNAME" not in text  # between machines the site must name the interface
    alone = script(Settings(VENV, cpus=4), ranks=Ranks(2))
    assert "export SRUN_CPUS_PER_TASK=4" in alone
    assert "export GLOO_SOCKET_IFNAME=lo MASTER_ADDR=127.0.0.1" in alone
    assert "unset SLURM_NTASKS" not in alone
    assert "srun" not in script()


def test_an_image_gets_the_project_its_gpus_and_the_run():
    docker = script(Settings(Environment("docker", "localhost/dp-lora:0.1.0"), gpus="1"))
    (line,) = [line for line in docker.splitlines() if line.startswith("docker run")]
    assert '--volume "$PWD":"$PWD" --workdir "$PWD"' in line
    assert "--env MLFLOW_RUN_ID --env MLFLOW_EXPERIMENT_ID --env MLFLOW_TRACKING_URI" in line
    assert '--gpus "\\"device=$CUDA_VISIBLE_DEVICES\\""' in line
    assert "SLURM_PROCID" not in line
    assert "--env SLURM_PROCID" in script(Settings(Environment("docker", "image")), ranks=Ranks(2))
    tarball = script(Settings(Environment("apptainer", "/shared/dp lora.tar"), gpus="1"))
    assert 'apptainer exec --nv --bind "$PWD" --pwd "$PWD" docker-archive:\'/shared/dp lora.tar\' bash' in tarball
    assert "docker-archive" not in script(Settings(Environment("apptainer", "/shared/dp-lora.sif")))


def stand_in(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


def run_script(tmp_path: Path, text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a batch script as slurmd would; stand-ins for Slurm's commands come first in PATH."""
    (tmp_path / "job.sh").write_text(text)
    given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", **environment}
    return subprocess.run(
        ["bash", str(tmp_path / "job.sh")],
        cwd=tmp_path, env=given, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


HOSTILE = "x; touch PWN $(touch PWN) `touch PWN` ' \" && touch PWN \\"


def test_a_script_hands_a_command_over_to_the_letter_and_ends_with_its_status(tmp_path):
    done = run_script(tmp_path, script(command=f"printf %s {shlex.quote(HOSTILE)}; exit 3"))
    assert (done.stdout, done.returncode) == (HOSTILE, 3)
    ranks = script(command=f"printf '%s ' $SLURM_PROCID $MLFLOW_RUN_ID {shlex.quote(HOSTILE)}", ranks=Ranks(2))
    stand_in(tmp_path, "srun", 'for n in 0 1; do SLURM_PROCID=$n "$@"; done')
    assert run_script(tmp_path, ranks).stdout == f"0 {'a' * 32} {HOSTILE} 1 {HOSTILE} "
    lines = f"{HOSTILE}\nEND\ntouch PWN"
    assert run_script(tmp_path, script(command=f"printf %s {shlex.quote(lines)}")).stdout == lines
    assert run_script(tmp_path, script(command="printf %s ' a\\b '")).stdout == " a\\b "
    assert not (tmp_path / "PWN").exists()


STOPPED = "trap 'echo kept; exit 130' {signal}; sleep 0.5; kill -USR1 $PPID; for n in $(seq 300); do sleep 0.1; done"


@pytest.mark.parametrize(("requeue", "signal"), [(True, "USR1"), (False, "TERM")])
def test_near_its_limit_the_work_is_told_and_the_job_begins_again_where_it_should(tmp_path, requeue, signal):
    stand_in(tmp_path, "scontrol", 'echo "$@"')
    text = script(Settings(VENV, requeue=requeue), command=STOPPED.format(signal=signal))
    done = run_script(tmp_path, text)
    assert done.stdout.splitlines() == ["kept", *(["requeue 7"] if requeue else [])]
    assert ("does not begin again" in done.stderr) == (not requeue)
    assert done.returncode == 124


def test_a_job_that_fails_near_its_limit_does_not_begin_again(tmp_path):
    stand_in(tmp_path, "scontrol", 'echo "$@"')
    done = run_script(tmp_path, script(command=STOPPED.format(signal="USR1").replace("130", "1")))
    assert (done.stdout, done.returncode) == ("kept\n", 1)


def test_an_array_runs_one_command_a_task_and_waits_for_what_is_upstream(tmp_path, monkeypatch):
    commands = ["printf first", f"printf %s {shlex.quote(HOSTILE)}"]
    text = array_script(Settings(VENV), "study", commands, 2)
    assert "#SBATCH --array=0-1%2\n" in text
    assert run_script(tmp_path, text, SLURM_ARRAY_TASK_ID="0").stdout == "first"
    assert run_script(tmp_path, text, SLURM_ARRAY_TASK_ID="1").stdout == HOSTILE
    stand_in(tmp_path, "sbatch", f'printf "%s\\n" "$@" > {tmp_path}/given; echo "12;one"')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    assert submit_array(Settings(VENV), "study", commands, 2, tmp_path / "jobs", ["7", "8"], comment="run") == "12"
    given = (tmp_path / "given").read_text().splitlines()
    assert "--comment=run" in given
    assert {"--dependency=afterok:7:8", "--kill-on-invalid-dep=yes", f"--output={tmp_path}/jobs/%a.log"} <= {*given}
    assert Path(given[-1]).read_text() == text
    for wrong in ([], ["true"] * 1001):
        with pytest.raises(InputError, match="from 1 to 1000"):
            array_script(Settings(VENV), "study", wrong, 2)
    with pytest.raises(InputError, match="at least 1 must run"):
        array_script(Settings(VENV), "study", commands, 0)


def test_an_empty_backend_config_leaves_all_to_the_site(tmp_path):
    settings = read_settings({}, tmp_path)
    assert settings == Settings(Environment("venv", str(tmp_path)))
    assert (settings.wait, settings.on_interrupt, settings.requeue, settings.signal) == (True, "cancel", True, 120)


def test_a_job_may_wait_for_another_one(tmp_path):
    extra = ["--dependency=afterok:12", "--kill-on-invalid-dep=yes"]
    settings = read_settings({"extra": extra}, tmp_path)
    assert "#SBATCH --dependency=afterok:12\n#SBATCH --kill-on-invalid-dep=yes\n" in script(settings)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"partitions": "gpu"}, "no key 'partitions'; did you mean partition?"),
        ({"partition": "gpu\n#SBATCH --uid=0"}, "partition='gpu\\n#SBATCH --uid=0': write it as gpu"),
        ({"account": "a b"}, "account='a b'"),
        ({"account": "FILL_IN"}, "account=FILL_IN: write your site's, such as project1; null takes the site's default"),
        ({"account": "$(id)"}, "account='$(id)'"),
        ({"gpus": 0}, "gpus=0"),
        ({"gpus": True}, "gpus=True"),
        ({"gpus": "a100:2;id"}, "gpus='a100:2;id'"),
        ({"cpus": "8"}, "cpus='8': must be a whole number from 1 to 4096"),
        ({"memory": "64 GB"}, "memory='64 GB': write it as 64G"),
        ({"time": "12h"}, "time='12h': write it as 12:00:00 or 2-00:00:00"),
        ({"constraint": "a100 --uid=0"}, "constraint='a100 --uid=0'"),
        ({"extra": "--qos=long"}, "extra='--qos=long': must be a list"),
        ({"extra": ["qos=long"]}, "extra: 'qos=long': write it as --NAME=VALUE"),
        ({"extra": ["--qos=long --uid=0"]}, "write it as --NAME=VALUE"),
        ({"extra": ["--wrap=id"]}, "extra: --wrap is set by its own key, or by the backend"),
        ({"extra": ["--output=/tmp/x"]}, "--output is set by its own key"),
        ({"wait": "yes"}, "wait='yes': must be true or false"),
        ({"on_interrupt": "ignore"}, "on_interrupt='ignore': must be cancel or leave"),
        ({"signal": 5}, "signal=5: must be a whole number from 10 to 65535"),
        ({"environment": "/venv"}, "environment='/venv': must have one of venv, docker, apptainer"),
        ({"environment": {"conda": "x"}}, "environment: no kind 'conda'"),
        ({"environment": {"venv": "venv"}}, "environment.venv='venv': must be an absolute path"),
        ({"environment": {"venv": "/nowhere"}}, "there is no /nowhere/bin/python"),
        ({"environment": {"apptainer": "/nowhere.sif"}}, "there is no /nowhere.sif"),
        ({"environment": {"docker": "an image"}}, "environment.docker='an image'"),
    ],
)
def test_a_backend_config_that_is_wrong_says_what_in_one_line(tmp_path, given, says):
    with pytest.raises(InputError) as error:
        read_settings(given, tmp_path)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/slurm").glob("*.json")), ids=lambda path: path.stem)
def test_each_template_is_a_valid_backend_config(path, tmp_path):
    given = json.loads(path.read_text())
    ((kind, place),) = given["environment"].items()
    if kind != "docker":
        made = tmp_path / place.lstrip("/")
        (made / "bin").mkdir(parents=True)
        (made / "bin/python").touch()
        given["environment"] = {kind: str(made)}
    given = {key: "project1" if value == "FILL_IN" else value for key, value in given.items()}
    settings = read_settings(given, tmp_path)
    assert settings.environment.kind == kind
    assert "#SBATCH --time=" in script(settings)


def test_docs_table_every_key_of_the_backend_config():
    page = (ROOT / "docs/clusters.md").read_text(encoding="utf-8")
    assert [key for key in KEYS if f"| `{key}` |" not in page] == []
