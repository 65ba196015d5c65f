"""A tracking server that goes away: real servers, killed and started again, and the records on disk meanwhile."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from dp_lora import native_backend, tracking
from dp_lora.config import ROOT, load
from dp_lora.errors import InputError
from dp_lora.tracking import outbox, process, records, sender, store
from tests.support.prepare_call import clone
from tests.support.tracked_work import tell
from tests.support.tracking_server import IMPATIENT, Server, free_port
from tests.support.tracking_store import empty_store, made_run, use_store


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project with its own runs/."""
    return clone(ROOT, tmp_path_factory.mktemp("outbox") / "project")


@pytest.fixture(autouse=True)
def boxes(project, monkeypatch) -> Path:
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in IMPATIENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(outbox, "OUTBOX", project / "runs" / "outbox")
    return outbox.OUTBOX


@pytest.fixture(scope="module")
def one_server(tmp_path_factory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), empty_store())
    server.start()
    yield server
    server.kill()


@pytest.fixture
def server(one_server, monkeypatch) -> Server:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", one_server.uri)
    return one_server


@pytest.fixture
def away(monkeypatch) -> str:
    """The address of a server that is not there."""
    uri = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


def facts(run_id: str) -> dict:
    """All facts about a run in a store that do not depend on the time or process that sent them."""
    from mlflow import MlflowClient

    client = MlflowClient(store.tracking_uri())
    run = client.get_run(run_id)
    passing = ("pid", "process", "dirty", "mlflow.source.")
    files = {}
    folders = [""]
    while folders:
        for found in client.list_artifacts(run_id, folders.pop()):
            if found.is_dir:
                folders.append(found.path)
            else:
                name = re.sub(r"timestamp\+\d+\+[0-9a-f-]{36}", "when", found.path)
                assert name not in files
                files[name] = Path(client.download_artifacts(run_id, found.path)).read_bytes()
    files["messages.txt"] = re.findall(rb"told \w+", files["messages.txt"])
    return {
        "status": run.info.status,
        "metrics": {
            name: [(point.step, point.value) for point in client.get_metric_history(run_id, name)]
            for name in run.data.metrics
        },
        "params": run.data.params,
        "tags": {
            key: re.sub(r"Code: commit .*", "", value)
            for key, value in run.data.tags.items()
            if not key.startswith(passing)
        },
        "files": files,
        "inputs": sorted(
            (given.dataset.name, given.dataset.digest, sorted((tag.key, tag.value) for tag in given.tags))
            for given in run.inputs.dataset_inputs
        ),
    }


@pytest.fixture(scope="module")
def undisturbed(one_server, tmp_path_factory) -> dict:
    """The facts of a run whose server is there all the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", one_server.uri)
        with tracking.run("finetune", load("mnist5k")) as run:
            for part in ("before", "after"):
                tell(run, part, tmp_path_factory.mktemp("undisturbed") / part)
        found = facts(run.run_id)
    assert found["status"] == "FINISHED"
    assert len(found["metrics"]["after/loss"]) == 3
    assert sum(name.startswith("images/") for name in found["files"]) == 4
    return found


@pytest.mark.slow
def test_a_server_killed_in_the_midst_of_a_run_and_started_again_has_everything(
    server, undisturbed, boxes, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sender, "PAUSE", 0.0)
    with tracking.run("finetune", load("mnist5k")) as run:
        tell(run, "before", tmp_path / "before")
        server.kill()
        tell(run, "after", tmp_path / "after")
        assert tracking.waiting_runs() == [run.run_id]
        server.start()
    assert facts(run.run_id) == undisturbed
    assert not (boxes / run.run_id).exists()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tracking server")]
    assert any("the work goes on, records wait in runs/outbox/" in line for line in said)
    assert re.search(r"\d+ records that waited were sent", said[-1])


def upload(project: Path, *run_ids: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "dp_lora", "upload", *run_ids]
    return subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_run_whose_server_is_gone_for_good_completes_and_one_command_uploads_it_after_any_kill(
    server, undisturbed, boxes, project, tmp_path, monkeypatch
):
    work = subprocess.Popen(
        [sys.executable, "-m", "tests.support.tracked_work", str(tmp_path), "150"],
        cwd=project,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    run_id = work.stdout.readline().strip()
    server.kill()
    _, said = work.communicate("\n", timeout=120)
    assert work.returncode == 0, said
    assert said.splitlines()[-1].endswith("when the server is back, type: .venv/bin/dp-lora upload")
    folder = boxes / run_id

    early = upload(project)
    (line,) = early.communicate(timeout=60)[1].splitlines()
    assert early.returncode == 1
    assert line.startswith(f"error: tracking store {server.uri}: no server is there")

    server.start()
    # the next command on this host knows that the run's process has ended; in another folder it does not know that
    # records wait, and closes the run
    assert tracking.close_orphans() == []
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(outbox, "OUTBOX", tmp_path / "elsewhere")
        assert tracking.close_orphans() == [run_id]

    number = len(list(folder.glob("*/record.json")))
    killed = upload(project)
    while len(list(folder.glob("*/record.json"))) > number - 30:
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    left = len(list(folder.glob("*/record.json")))
    assert 0 < left <= number - 30

    second = upload(project, run_id)
    out, error = second.communicate(timeout=120)
    assert second.returncode == 0, error
    assert out.splitlines()[-1] == f"{run_id}: {left} records sent"
    found = facts(run_id)
    assert {found["tags"].pop(f"tag_{number}") for number in range(150)} == {str(number) for number in range(150)}
    assert found == undisturbed
    assert not folder.exists()

    third = upload(project)
    assert third.communicate(timeout=60)[0] == "nothing waits\n"
    assert third.returncode == 0


PROJECT = """
name: tiny
entry_points:
  main: {command: "python -m tests.support.tracked_work $PLACE 1"}
"""


@pytest.mark.slow
def test_mlflow_run_ends_well_where_the_work_did_and_the_server_is_gone(server, boxes, project, tmp_path):
    (tmp_path / "MLproject").write_text(PROJECT)
    environment = {**os.environ, "PYTHONPATH": str(project), "PLACE": str(tmp_path)}
    command = [sys.executable, "-m", "mlflow", "run", ".", "-b", "native"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    work = subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes)
    run_id = work.stdout.readline().strip()
    server.kill()
    _, said = work.communicate("\n", timeout=200)
    assert work.returncode == 0, said
    assert "succeeded" in said
    server.start()
    assert tracking.upload([run_id], lambda _: None) == []
    found = facts(run_id)
    assert (found["status"], found["tags"]["tag_0"], "error" in found["tags"]) == ("FINISHED", "0", False)


def test_a_killed_run_ends_as_killed_once_its_records_are_uploaded(server, boxes):
    gone = process.process_tags() | {"boot_id": "earlier"}
    client = store.connect()
    run_id = client.create_run("0", tags=gone).info.run_id
    with outbox.open_outbox(run_id) as box:
        box.append(records.tags({"last": "words"}))
    assert tracking.close_orphans() == []
    assert tracking.upload([run_id], lambda _: None) == []
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["last"]) == ("KILLED", "words")


def test_uploads_to_a_server_that_does_not_know_the_run_or_has_deleted_it_lose_nothing(server, boxes):
    deleted = store.connect().create_run("0").info.run_id
    store.connect().delete_run(deleted)
    for run_id, words in (("f" * 32, "set MLFLOW_TRACKING_URI to the run's own server"), (deleted, "runs restore")):
        with outbox.open_outbox(run_id) as box:
            box.append(records.tags({"a": "b"}))
        (problem,) = tracking.upload([run_id], pytest.fail)
        assert words in problem
        assert run_id in tracking.waiting_runs()
        with outbox.open_outbox(run_id) as box:
            box.remove_first()


def test_records_are_kept_in_order_with_their_files_and_go_one_by_one(boxes, tmp_path):
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "a.txt").write_text("a")
    with outbox.open_outbox("a" * 32) as box:
        for number in range(12):
            box.append(records.tags({"number": str(number)}))
        box.append(records.artifact(tmp_path / "release", "release"))
        (tmp_path / "release" / "a.txt").write_text("changed since")
    assert outbox.waiting_runs() == ["a" * 32]
    # the remains of a record whose removal or writing was cut short
    (boxes / ("a" * 32) / "00000000" / "files").mkdir(parents=True)
    (boxes / ("a" * 32) / ".00000099.0.tmp").mkdir()
    with outbox.open_outbox("a" * 32) as box:
        assert len(box) == 13
        for number in range(12):
            assert box.first().content == {"tags": {"number": str(number)}}
            box.remove_first()
        assert (box.first().path / "a.txt").read_text() == "a"
        with pytest.raises(BlockingIOError), outbox.open_outbox("a" * 32):
            pass
        box.remove_first()
        assert box.first() is None
    assert not (boxes / ("a" * 32)).exists()


def test_who_waited_for_an_outbox_owns_it_alone_although_the_folder_went_meanwhile(boxes):
    owned, done = threading.Event(), threading.Event()

    def second():
        with outbox.open_outbox("a" * 32, wait=True):
            owned.set()
            done.wait(60)

    waiting = threading.Thread(target=second)
    with outbox.open_outbox("a" * 32) as box:
        box.append(records.tags({"a": "b"}))
        waiting.start()
        time.sleep(0.3)  # the thread now waits for the lock
        assert not owned.is_set()
        box.remove_first()
    assert owned.wait(60)
    assert not (boxes / ("a" * 32)).exists()
    with pytest.raises(BlockingIOError), outbox.open_outbox("a" * 32):
        pass
    done.set()
    waiting.join()


def test_a_damaged_record_is_named(boxes):
    with outbox.open_outbox("b" * 32) as box:
        box.append(records.tags({"a": "b"}))
        next(boxes.glob("b*/*/record.json")).write_text("{")
        with pytest.raises(InputError, match=r"00000001: cannot be read \(JSONDecodeError\)"):
            box.first()
        box.remove_first()


def test_what_is_kept_is_json_also_where_a_metric_is_no_number(boxes, tmp_path, monkeypatch):
    from mlflow.entities import Metric

    client = use_store(tmp_path, monkeypatch)
    run_id = made_run(client)
    given = [Metric("loss", float("nan"), 5, 1), Metric("epsilon", float("inf"), 5, 2), Metric("k", 0.1, 5, 3)]
    with outbox.open_outbox(run_id) as box:
        box.append(records.metrics(given))
        json.loads(next(boxes.glob(f"{run_id}/*/record.json")).read_text(), parse_constant=pytest.fail)
        for _ in range(2):
            records.send(client, run_id, box.first())
        box.remove_first()
    (nan,) = client.get_metric_history(run_id, "loss")
    (k,) = client.get_metric_history(run_id, "k")
    assert nan.value != nan.value
    assert (k.value, k.step, k.timestamp) == (0.1, 3, 5)


def test_what_a_server_refuses_for_good_is_raised_when_told_and_dropped_with_a_line_when_it_waited(boxes, monkeypatch):
    sent: list[records.Record] = []
    lines: list[str] = []

    def send(_client, _run_id, record):
        if "bad" in record.content["tags"]:
            raise MlflowException.invalid_parameter_value("bad name")
        sent.append(record)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somewhere")
    monkeypatch.setattr(sender, "server_problem", lambda *_: None)
    monkeypatch.setattr(records, "send", send)
    telling = sender.Sender(None, "c" * 32, lines.append)
    telling.keep_working()
    with pytest.raises(MlflowException, match="bad name"):
        telling.send(records.tags({"bad": "1"}))
    with outbox.open_outbox("d" * 32) as box:
        for name in ("good", "bad", "better"):
            box.append(records.tags({name: "1"}))
        sender.deliver(None, "d" * 32, box, lines.append)
    assert [list(record.content["tags"]) for record in sent] == [["good"], ["better"]]
    assert lines == ["refused by the tracking server and dropped: values bad: bad name"]


def test_a_server_that_takes_nothing_costs_its_retries_once_and_every_record_waits_in_order(boxes, monkeypatch):
    tries: list[records.Record] = []
    lines: list[str] = []
    broken = [True]

    def send(_client, _run_id, record):
        tries.append(record)
        if broken[0]:
            raise MlflowException("API request failed with exception too many 500 error responses")

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somewhere")
    monkeypatch.setattr(sender, "server_problem", lambda *_: None)
    monkeypatch.setattr(records, "send", send)
    telling = sender.Sender(None, "e" * 32, lines.append)
    telling.keep_working()
    told = [records.tags({str(number): "1"}) for number in range(5)]
    for record in told:
        telling.send(record)
    assert len(tries) == len(lines) == 1
    assert not telling.close()
    assert "5 records wait" in lines[-1]
    # another sender of the same run, such as that of `mlflow run`, finds the waiting records
    broken[0] = False
    tries.clear()
    other = sender.Sender(None, "e" * 32, lines.append)
    other.keep_working()
    other.send(records.tags({"5": "1"}))
    assert other.close()
    assert [list(record.content["tags"]) for record in tries] == [[str(number)] for number in range(6)]
    assert not (boxes / ("e" * 32)).exists()


def test_before_the_work_begins_and_with_a_local_store_errors_are_raised(boxes, tmp_path, monkeypatch, away):
    from mlflow import MlflowClient

    client = MlflowClient(away)
    opening = sender.Sender(client, "f" * 32, pytest.fail)
    with pytest.raises(MlflowException, match="API request"):
        opening.send(records.tags({"a": "b"}))
    local = use_store(tmp_path, monkeypatch)
    direct = sender.Sender(local, "f" * 32, pytest.fail)
    direct.keep_working()
    with pytest.raises(MlflowException, match="not found"):
        direct.send(records.tags({"a": "b"}))
    assert tracking.waiting_runs() == []


def test_the_true_end_takes_back_what_another_process_thought(boxes, tmp_path, monkeypatch):
    client = use_store(tmp_path, monkeypatch)
    run_id = made_run(client, tags={"error": records.DIED})
    client.set_terminated(run_id, "KILLED")
    record = records.end("FINISHED")
    records.send(client, run_id, record)
    run = client.get_run(run_id)
    assert (run.info.status, run.info.end_time) == ("FINISHED", record.content["end_time"])
    assert "error" not in run.data.tags


def test_mlflow_run_says_of_a_run_what_the_run_could_not_and_leaves_what_it_said(boxes, away):
    from mlflow import MlflowClient

    client = MlflowClient(away)
    with outbox.open_outbox("1" * 32) as box:
        box.append(records.end("FINISHED"))
    assert not native_backend._end(client, "1" * 32, "FINISHED", "")
    assert not native_backend._end(client, "2" * 32, "KILLED", "ended by SIGKILL")
    for run_id, kinds in (("1" * 32, ["end"]), ("2" * 32, ["values", "end"])):
        with outbox.open_outbox(run_id) as box:
            found = []
            while record := box.first():
                found.append(record)
                box.remove_first()
        assert [record.kind for record in found] == kinds
    assert (found[0].content["tags"]["error"], found[1].content["status"]) == ("ended by SIGKILL", "KILLED")


def test_a_stage_waits_for_its_parents_server_to_come_back(away, capsys):
    class Health(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    def later():
        time.sleep(2)
        with HTTPServer(("127.0.0.1", int(away.rpartition(":")[2])), Health) as back:
            back.handle_request()

    thread = threading.Thread(target=later)
    thread.start()
    store.connect(patience=60)
    thread.join()
    assert "waiting for it" in capsys.readouterr().err
    with pytest.raises(InputError, match="no server is there"):
        store.connect(patience=0.1)


@pytest.mark.parametrize("value", ["nope", "../x"])
def test_what_is_no_run_id_is_refused_in_one_line(value, project):
    done = upload(project, value)
    assert done.communicate(timeout=60)[1] == f"error: {value}: not an MLflow run id (32 hex digits)\n"
    assert done.returncode == 1


def test_what_waits_is_not_uploaded_to_a_local_store(boxes, tmp_path, monkeypatch):
    use_store(tmp_path, monkeypatch)
    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI: is sqlite"):
        tracking.upload(["a" * 32], pytest.fail)
    assert not os.path.exists(boxes / ("a" * 32))
