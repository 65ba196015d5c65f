"""`mlflow run -b native` on a small project: real processes, and states read back from the store."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dp_lora import project_run
from dp_lora.tracking import session, store
from dp_lora.tracking.ending import ended_by
from tests.support.tracking_store import all_runs, made_run, use_store

# the image does not exist, so a test fails if the backend touches Docker
MLPROJECT = """
name: tiny
docker_env:
  image: localhost/there-is-no-such-image:0
entry_points:
  main:
    parameters:
      config: {type: string, default: one}
      eps: {type: string, default: ""}
    command: "python work.py report --config {config} --eps {eps}"
  fail: {command: "python work.py fail"}
  say_killed: {command: "kill -KILL $$"}
  tracked: {command: "python work.py tracked"}
  sleep: {command: "python work.py sleep && python work.py report"}
"""

WORK = """
import json, os, pathlib, signal, subprocess, sys, time

here = pathlib.Path(__file__).parent

def report(name):
    names = ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID")
    found = {name: os.environ.get(name) for name in names}
    found |= {"arguments": sys.argv[2:], "python": sys.executable, "folder": os.getcwd(), "pid": os.getpid()}
    (here / f".{name}").write_text(json.dumps(found))
    (here / f".{name}").rename(here / name)

if sys.argv[1] == "report":
    report("report.json")
elif sys.argv[1] == "fail":
    sys.exit(3)
elif sys.argv[1] == "sleep":
    # a grandchild that does not listen to SIGTERM
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
    grandchild = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    grandchild.stdout.readline()
    (here / "grandchild").write_text(str(grandchild.pid))
    report("sleeps.json")
    time.sleep(600)
elif sys.argv[1] == "tracked":
    from dp_lora import tracking
    from dp_lora.config import load

    with tracking.run("finetune", load("mnist5k", {"eps": "5"}), child=False) as run:
        run.metric("epsilon", 1.5, 7)
        report("sleeps.json")
        time.sleep(600)
"""

MLFLOW = [str(Path(sys.executable).with_name("mlflow")), "run", ".", "-b", "native"]


@pytest.fixture
def client(tmp_path, monkeypatch):
    (tmp_path / "MLproject").write_text(MLPROJECT)
    (tmp_path / "work.py").write_text(WORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DOCKER_HOST", "unix:///there-is-no-docker.sock")
    monkeypatch.setattr(session, "GRACE", 2.0)
    yield use_store(tmp_path, monkeypatch)
    # undo it: the backend sets the tracking URI for the whole process
    import mlflow

    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]


def wait_for(path: Path, process: subprocess.Popen) -> dict:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, "ended too early"
        assert time.monotonic() < deadline, f"{path} was never written"
        time.sleep(0.05)
    return json.loads(path.read_text())


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def run_here(entry_point: str = "main", **parameters: str):
    import mlflow

    return mlflow.projects.run(".", entry_point, backend="native", parameters=parameters)


def test_mlflow_run_with_the_native_backend_runs_in_place_and_finishes(client, tmp_path):
    hostile = "x; touch PWN $(touch PWN) `touch PWN` ' \" && touch PWN"
    done = subprocess.run([*MLFLOW, "-P", f"config={hostile}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (run,) = all_runs(client)
    said = json.loads((tmp_path / "report.json").read_text())
    assert said["arguments"] == ["--config", hostile, "--eps", ""]
    assert not (tmp_path / "PWN").exists()
    assert said["folder"] == str(tmp_path)
    assert said["python"] == sys.executable
    assert said["MLFLOW_RUN_ID"] == run.info.run_id
    assert said["MLFLOW_TRACKING_URI"] == store.tracking_uri()
    assert said["MLFLOW_EXPERIMENT_ID"] == run.info.experiment_id
    assert client.get_experiment(run.info.experiment_id).name == "dp-lora"
    assert (run.info.status, run.data.tags["mlflow.project.backend"]) == ("FINISHED", "native")
    assert run.data.params["eps"] == "''"


def test_a_failing_entry_point_fails_the_run_and_the_caller(client):
    from mlflow.exceptions import ExecutionException

    with pytest.raises(ExecutionException, match="failed: exit status 3"):
        run_here("fail")
    (run,) = all_runs(client)
    assert (run.info.status, run.data.tags["error"]) == ("FAILED", "exit status 3")


def test_an_entry_point_that_the_system_kills_is_killed(client):
    from mlflow.exceptions import ExecutionException

    with pytest.raises(ExecutionException, match="killed: ended by SIGKILL"):
        run_here("say_killed")
    assert all_runs(client)[0].info.status == "KILLED"


def test_an_unknown_entry_point_makes_no_run(client):
    from mlflow.exceptions import ExecutionException

    with pytest.raises(ExecutionException, match="Could not find nonsense"):
        run_here("nonsense")
    assert all_runs(client) == []


def test_a_run_started_inside_a_run_is_its_child(client, monkeypatch):
    parent = made_run(client)
    monkeypatch.setenv("MLFLOW_RUN_ID", parent)
    child = run_here().run_id
    assert client.get_run(child).data.tags["mlflow.parentRunId"] == parent
    assert client.get_run(child).info.status == "FINISHED"
    assert client.get_run(parent).info.status == "RUNNING"


def test_without_a_tracking_uri_the_store_is_the_projects_and_an_experiment_keeps_its_name(
    client, tmp_path, monkeypatch
):
    import mlflow

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    named = use_store(elsewhere, monkeypatch).create_experiment("mine")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setattr(store, "PROJECT", tmp_path)

    # from the project's root MLflow's default is the same file
    assert store.sqlite_path(mlflow.get_tracking_uri()) == tmp_path / "mlflow.db"
    assert client.get_experiment(project_run.use_project_store("0")).name == "dp-lora"
    assert mlflow.get_tracking_uri() == store.sqlite_uri(tmp_path / "mlflow.db") == os.environ["MLFLOW_TRACKING_URI"]

    # from another folder MLflow's default is another file, in which the command line has made the experiment
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    monkeypatch.chdir(elsewhere)
    assert client.get_experiment_by_name("mine") is None
    assert project_run.use_project_store(named) == client.get_experiment_by_name("mine").experiment_id
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (0, "FINISHED"),
        (1, "FAILED"),
        (-9, "KILLED"),
        (137, "KILLED"),
        (143, "KILLED"),
        (-11, "FAILED"),
        (255, "FAILED"),
    ],
)
def test_the_exit_status_decides_the_state(code, status):
    assert ended_by(code)[0] == status


def test_an_interrupted_wait_ends_every_process_of_the_group(client, tmp_path, monkeypatch):
    waited = subprocess.Popen.wait

    def interrupted(self, timeout=None):
        if not (tmp_path / "interrupted").exists():
            wait_for(tmp_path / "sleeps.json", self)
            (tmp_path / "interrupted").write_text("")
            raise KeyboardInterrupt
        return waited(self, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_here("sleep")
    assert all_runs(client)[0].info.status == "KILLED"
    assert not lives(json.loads((tmp_path / "sleeps.json").read_text())["pid"])
    assert not lives(int((tmp_path / "grandchild").read_text()))
    assert not (tmp_path / "report.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stopped_mlflow_run_leaves_a_killed_run_and_no_process(client, tmp_path, number):
    process = subprocess.Popen([*MLFLOW, "-e", "tracked"], start_new_session=True, stderr=subprocess.PIPE, text=True)
    pid = wait_for(tmp_path / "sleeps.json", process)["pid"]
    # as a terminal sends Ctrl-C: to the command's process group, which the entry point is not in
    os.killpg(process.pid, number)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 1, told
    (run,) = all_runs(client)
    assert (run.info.status, run.info.run_name) == ("KILLED", "mnist5k eps=5 r=4 k=1")
    assert run.data.metrics["epsilon"] == 1.5
    assert not lives(pid)


@pytest.mark.slow
def test_an_entry_point_outlives_a_killed_mlflow_run_and_closes_its_own_run(client, tmp_path):
    process = subprocess.Popen([*MLFLOW, "-e", "tracked"], start_new_session=True, stderr=subprocess.DEVNULL)
    pid = wait_for(tmp_path / "sleeps.json", process)["pid"]
    process.kill()
    process.wait()
    assert all_runs(client)[0].info.status == "RUNNING"
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 60
    while lives(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all_runs(client)[0].info.status == "KILLED"


@pytest.mark.slow
def test_two_at_once_end_in_one_store_each_in_its_own_state(client):
    commands = [[*MLFLOW, "-e", name] for name in ("main", "fail")]
    processes = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for command in commands]
    assert [process.wait(timeout=120) for process in processes] == [0, 1]
    assert sorted(run.info.status for run in all_runs(client)) == ["FAILED", "FINISHED"]
