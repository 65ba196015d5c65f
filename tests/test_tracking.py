"""Runs on a real SQLite store; MLflow's own client reads states and values back."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dp_lora import tracking
from dp_lora.config import ROOT, flatten, load
from dp_lora.errors import InputError
from dp_lora.tracking import metrics, process, provenance, store, tracked_run
from dp_lora.tracking.ending import end_status
from tests.support.tracking_store import all_runs, artifacts, made_run, use_store


@pytest.fixture
def client(tmp_path, monkeypatch):
    return use_store(tmp_path, monkeypatch)


@pytest.fixture
def config():
    return load("mnist5k", {"eps": "5"})


def test_importing_tracking_stays_fast_by_not_importing_mlflow_or_torch():
    code = "import dp_lora.tracking, sys; sys.exit(any(name in sys.modules for name in ('mlflow', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_run_logs_every_leaf_of_the_config_and_finishes(client, config):
    with tracking.run("finetune", config, child=False) as run:
        assert client.get_run(run.run_id).info.status == "RUNNING"
        run.params({"lora.rank": 77, "steps": 100})
    done = client.get_run(run.run_id)
    assert done.info.status == "FINISHED"
    assert done.info.run_name == "mnist5k eps=5 r=4 k=1"
    assert set(flatten(config)) | {"steps"} == set(done.data.params)
    assert done.data.params["privacy.eps"] == "5.0"
    assert done.data.params["lora.rank"] == "4"  # the first value stays
    assert done.data.params["data.path"] == "null"
    assert done.data.params["data.classes"].startswith('["0","1"')
    assert done.data.tags["stage"] == "finetune"
    assert done.data.tags["experiment"] == "mnist5k"
    assert len(done.data.tags["mlflow.source.git.commit"]) == 40
    assert done.data.tags["dirty"] in ("true", "false")
    assert client.get_experiment(done.info.experiment_id).name == "dp-lora"
    text = (artifacts(run.run_id) / "config.yaml").read_text()
    assert "eps: 5.0" in text


def test_stages_that_concern_no_private_data_are_named_by_experiment_and_stage(config):
    assert provenance.run_name("pretrain_ldm", config) == "mnist5k pretrain_ldm"
    assert provenance.run_name("sample", config) == "mnist5k eps=5 r=4 k=1 sample"
    assert provenance.run_name("finetune", load("mnist5k", {"eps": "inf"})) == "mnist5k eps=inf r=4 k=1"


def test_params_read_back_as_overrides_give_the_same_config(config):
    # skip a key that the config's name sets, one whose value has blanks, and one with a digit in its name
    skip = {"experiment.name", "experiment.description", "autoencoder.l1_weight"}
    texts = {key: provenance.param_text(value) for key, value in flatten(config).items() if key not in skip}
    overrides = " ".join(f"{key}={text}" for key, text in texts.items())
    assert load("mnist5k", {}, overrides) == config


def test_the_run_of_mlflow_run_is_joined_and_its_plain_params_stay(client, config, monkeypatch):
    from mlflow.entities import Param

    run_id = made_run(client)
    client.log_batch(run_id, params=[Param("eps", "5"), Param("k", "''")])
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    with tracking.run("finetune", config, child=False) as run:
        assert run.run_id == run_id
    done = client.get_run(run_id)
    assert len(all_runs(client)) == 1
    assert (done.data.params["eps"], done.data.params["k"], done.data.params["privacy.eps"]) == ("5", "''", "5.0")
    assert (done.info.status, done.info.run_name) == ("FINISHED", "mnist5k eps=5 r=4 k=1")


def test_a_name_that_the_user_gave_stays(client, config, monkeypatch):
    run_id = made_run(client, run_name="my favourite")
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    with tracking.run("finetune", config, child=False):
        pass
    assert client.get_run(run_id).info.run_name == "my favourite"


def test_a_stage_of_dvc_opens_a_child_and_leaves_the_parent_running(client, config, monkeypatch):
    parent = made_run(client)
    monkeypatch.setenv("MLFLOW_RUN_ID", parent)
    with tracking.run("pretrain_ae", config, child=True) as run:
        pass
    child = client.get_run(run.run_id)
    assert run.run_id != parent
    assert child.data.tags["mlflow.parentRunId"] == parent
    assert child.info.experiment_id == client.get_run(parent).info.experiment_id
    assert (child.info.status, client.get_run(parent).info.status) == ("FINISHED", "RUNNING")


def test_a_stage_of_dvc_outside_any_run_is_a_run_of_its_own(client, config):
    with tracking.run("pretrain_ae", config, child=True) as run:
        pass
    assert "mlflow.parentRunId" not in client.get_run(run.run_id).data.tags


def test_another_process_becomes_a_child_by_the_runs_environment(client, config, monkeypatch):
    with tracking.run("main", config, child=False) as outer:
        for name, value in outer.environment().items():
            monkeypatch.setenv(name, value)
        with tracking.run("prepare", config, child=True) as inner:
            pass
    assert client.get_run(inner.run_id).data.tags["mlflow.parentRunId"] == outer.run_id


def test_a_run_id_that_the_store_does_not_have_is_one_line(client, config, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with pytest.raises(InputError, match=r"MLFLOW_RUN_ID=0000.*unset it"), tracking.run("prepare", config, child=False):
        pass
    assert all_runs(client) == []


@pytest.mark.parametrize(
    ("error", "status", "tag"),
    [
        (InputError("rank=0: must be at least 1"), "FAILED", "rank=0: must be at least 1"),
        (
            InputError("anna.png: cut short", "a private picture cannot be read"),
            "FAILED",
            "a private picture cannot be read",
        ),
        (ZeroDivisionError("anna.png\nand more"), "FAILED", "ZeroDivisionError"),
        (
            FileNotFoundError(2, "No such file or directory", "anna.png"),
            "FAILED",
            "FileNotFoundError: No such file or directory",
        ),
        (KeyboardInterrupt(), "KILLED", "KeyboardInterrupt: KeyboardInterrupt"),
    ],
)
def test_an_exception_ends_the_run_in_its_true_state_with_all_metrics(client, config, error, status, tag):
    def work():
        with tracking.run("prepare", config, child=False) as run:
            run.metric("loss", 0.5, step=3)
            raise error

    with pytest.raises(type(error)):
        work()
    (done,) = all_runs(client)
    assert (done.info.status, done.data.tags["error"]) == (status, tag)
    assert done.data.metrics["loss"] == 0.5


def test_ctrl_c_that_a_library_turned_into_an_exit_is_still_killed():
    def interrupted() -> BaseException:
        try:
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt:
                sys.exit(1)
        except SystemExit as error:
            return error

    assert end_status(interrupted()) == "KILLED"
    assert end_status(SystemExit(0)) == "FINISHED"
    assert end_status(SystemExit(2)) == "FAILED"


def test_sigterm_ends_the_run_as_killed_and_the_old_handler_comes_back(client, config):
    before = signal.getsignal(signal.SIGTERM)

    def work():
        with tracking.run("prepare", config, child=False):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    with pytest.raises(tracking.Terminated, match="SIGTERM"):
        work()
    assert all_runs(client)[0].info.status == "KILLED"
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_in_a_forked_worker_ends_the_worker_and_not_the_run(client, config):
    with tracking.run("prepare", config, child=False) as run:
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == signal.SIGTERM
        assert client.get_run(run.run_id).info.status == "RUNNING"
    assert client.get_run(run.run_id).info.status == "FINISHED"


def test_nan_and_infinity_are_metrics_too(client, config):
    with tracking.run("finetune", config, child=False) as run:
        run.metric("private/loss", math.nan, step=1)
        run.metric("epsilon", math.inf)
        run.metric("private/grad norm (max)", -math.inf)
        run.metric("numpy", float(np.float32(0.5)))
    values = client.get_run(run.run_id).data.metrics
    assert math.isnan(values["private/loss"])
    assert values["epsilon"] > 1e300
    assert values["private/grad norm _max_"] < -1e300
    assert values["numpy"] == 0.5


def test_every_one_of_many_metrics_arrives_in_order_of_steps(client, config):
    with tracking.run("finetune", config, child=False) as run:
        for step in range(2500):
            run.metric("loss", step / 10, step=step)
    history = client.get_metric_history(run.run_id, "loss")
    assert {(point.step, point.value) for point in history} == {(step, step / 10) for step in range(2500)}


def test_metrics_reach_the_store_while_the_work_goes_on():
    sent: list = []
    buffer = metrics.MetricBuffer(sent.extend, warn=pytest.fail, seconds=0.01)
    buffer.add("epsilon", 1.0, 5)
    deadline = time.monotonic() + 30
    while not sent and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [(metric.key, metric.value, metric.step) for metric in sent] == [("epsilon", 1.0, 5)]
    buffer.close()


def test_a_store_that_is_away_for_a_while_loses_no_metric():
    sent: list = []
    warnings: list[str] = []
    away = [True]

    def send(batch):
        if away[0]:
            raise ConnectionError("gone")
        sent.extend(batch)

    buffer = metrics.MetricBuffer(send, warnings.append, seconds=3600)
    for step in range(1500):
        buffer.add("loss", step, step)
    assert not buffer.flush()
    assert not buffer.flush()
    away[0] = False
    buffer.add("loss", 1500, 1500)
    buffer.close()
    assert [metric.step for metric in sent] == list(range(1501))
    assert len(warnings) == 1


def test_what_the_store_refuses_for_good_is_dropped_and_does_not_block_the_rest():
    from mlflow.exceptions import MlflowException

    sent: list = []
    warnings: list[str] = []

    def send(batch):
        if any(metric.key == "bad" for metric in batch):
            raise MlflowException.invalid_parameter_value("bad name")
        sent.extend(batch)

    buffer = metrics.MetricBuffer(send, warnings.append, seconds=3600)
    buffer.add("bad", 1, 1)
    buffer.flush()
    buffer.add("good", 1, 1)
    buffer.close()
    assert [metric.key for metric in sent] == ["good"]
    assert warnings == ["1 metrics dropped: bad name"]


def test_pictures_tables_files_folders_and_messages_are_artifacts(client, config, tmp_path, capsys):
    picture = tmp_path / "made.png"
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(picture)
    (tmp_path / "release" / "peft").mkdir(parents=True)
    (tmp_path / "release" / "peft" / "a.json").write_text("{}")
    (tmp_path / "one.txt").write_text("one")
    with tracking.run("sample", config, child=False) as run:
        run.image("grid", picture)
        run.image("grids/step-50", picture)
        run.artifact(tmp_path / "release")
        run.artifact(tmp_path / "one.txt")
        run.table({"class": ["0", "1"], "accuracy": [0.5, 0.75]}, "accuracy")
        run.message("hello")
    folder = artifacts(run.run_id)
    assert folder.is_relative_to(tmp_path / "mlartifacts")
    assert (folder / "grid.png").read_bytes() == (folder / "grids/step-50.png").read_bytes() == picture.read_bytes()
    assert (folder / "release/peft/a.json").is_file()
    assert (folder / "one.txt").read_text() == "one"
    assert "hello" in (folder / "messages.txt").read_text()
    assert "hello" in capsys.readouterr().err
    table = client.load_table(run.experiment_id, "accuracy.json", run_ids=[run.run_id])
    assert table["accuracy"].tolist() == [0.5, 0.75]


def test_a_dataset_reads_back_with_its_source_digest_and_context(client, config, tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    folder = tmp_path / "data" / "mnist"
    folder.mkdir(parents=True)
    (folder / "metadata.parquet").write_bytes(b"pictures")
    with tracking.run("finetune", config, child=False) as run:
        run.dataset("mnist", folder, "ab" * 32, "training")
        run.dataset("elsewhere", "https://example.org/data.zip", context="evaluation")
    first, second = client.get_run(run.run_id).inputs.dataset_inputs
    assert (first.dataset.name, first.dataset.digest) == ("mnist", ("ab" * 32)[:36])
    tags = {tag.key: tag.value for tag in first.tags}
    assert tags == {
        "mlflow.data.context": "training",
        "private": "false",
        "digest": "ab" * 32,
        "dvc": provenance.dvc_hash(folder),
    }
    assert Path(mlflow.data.get_source(first).load()) == folder
    assert mlflow.data.get_source(second).to_dict() == {"url": "https://example.org/data.zip"}
    assert "dvc" not in {tag.key for tag in second.tags}


@pytest.mark.slow
def test_the_dvc_hash_is_the_one_that_dvc_add_records(tmp_path):
    folder = tmp_path / "data"
    (folder / "a").mkdir(parents=True)
    for name in ("a/1.png", "a-b.txt", "a.txt", "Ünicode", "z"):
        (folder / name).write_text(name)
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "init", "--no-scm", "-q"], cwd=tmp_path, check=True)
    subprocess.run([*dvc, "add", "-q", "data"], cwd=tmp_path, check=True)
    assert f"md5: {provenance.dvc_hash(folder)}\n" in (tmp_path / "data.dvc").read_text()
    subprocess.run([*dvc, "remove", "-q", "data.dvc"], cwd=tmp_path, check=True)
    subprocess.run([*dvc, "add", "-q", "data/z"], cwd=tmp_path, check=True)
    assert f"md5: {provenance.dvc_hash(folder / 'z')}\n" in (folder / "z.dvc").read_text()


def test_a_run_id_stands_for_the_folder_that_the_run_wrote(client, config, tmp_path, monkeypatch):
    for module in (tracked_run, sys.modules["dp_lora.tracking.lookup"]):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    folder = tmp_path / "runs" / "x" / "release"
    folder.mkdir(parents=True)
    with tracking.run("finetune", config, child=False) as run:
        run.output(folder)
    assert tracking.find_run(run.run_id)["tags"]["output"] == "runs/x/release"
    assert tracking.resolve_input(run.run_id, "adapter") == folder
    assert tracking.resolve_input(str(folder), "adapter") == folder
    assert tracking.resolve_input("runs/x/release", "adapter") == folder
    shutil.rmtree(folder)
    with pytest.raises(InputError, match=f"adapter={run.run_id}: .* runs/x/release is not on this machine"):
        tracking.resolve_input(run.run_id, "adapter")


def test_an_input_that_is_neither_path_nor_run_is_refused_by_name_and_makes_no_store(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(store, "PROJECT", tmp_path)
    for value in ("nothing/here", "", "0" * 31):
        with pytest.raises(InputError, match=f"adapter={value}: no such path"):
            tracking.resolve_input(value, "adapter")
    with pytest.raises(InputError, match="ffff: no such run"):
        tracking.resolve_input("f" * 32, "adapter")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_the_store_does_not_have_is_refused_by_its_id(client):
    with pytest.raises(InputError, match=r"ffff.*not found"):
        tracking.find_run("f" * 32)


def test_bad_parameters_fail_the_joined_run(client, monkeypatch):
    run_id = made_run(client)
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    tracking.fail_joined_run("rank=0: no", child=True)
    assert client.get_run(run_id).info.status == "RUNNING"
    tracking.fail_joined_run("rank=0: no")
    tracking.fail_joined_run("a second one")
    done = client.get_run(run_id)
    assert (done.info.status, done.data.tags["error"]) == ("FAILED", "rank=0: no")


def test_bad_parameters_of_a_direct_call_make_neither_run_nor_store(tmp_path, monkeypatch):
    for name in ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(store, "PROJECT", tmp_path)
    tracking.fail_joined_run("rank=0: no")
    assert list(tmp_path.iterdir()) == []


def test_a_tree_is_dirty_by_code_and_not_by_what_dvc_changes(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    assert provenance.git_tags(tmp_path) == {}
    git("init")
    files = ["dvc.lock", "params.yaml", "data.dvc", "pipelines/emnist/dvc.lock", "dp lora.py"]
    (tmp_path / "pipelines/emnist").mkdir(parents=True)
    for name in files:
        (tmp_path / name).write_text("a")
    git("add", ".")
    git("commit", "-m", "all")
    for name in files[:-1]:
        (tmp_path / name).write_text("b")
    (tmp_path / "untracked.py").write_text("b")
    assert provenance.git_tags(tmp_path)["dirty"] == "false"
    (tmp_path / files[-1]).write_text("b")
    assert provenance.git_tags(tmp_path)["dirty"] == "true"


def test_runs_whose_process_died_are_closed_when_the_next_one_opens_and_no_others(client, config):
    code = "from dp_lora.tracking.process import process_tags; print(process_tags())"
    gone = eval(
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    )
    here = process.process_tags()
    same_pid_of_another_time = here | {"process": here["process"] + "1"}
    runs = {
        "dead": made_run(client, tags=gone),
        "pid taken again": made_run(client, tags=same_pid_of_another_time),
        "before a reboot": made_run(client, tags=here | {"boot_id": "earlier"}),
        "alive": made_run(client, tags=here),
        "another host": made_run(client, tags=gone | {"host": "elsewhere"}),
        "another container": made_run(client, tags=gone | {"process": "1:1"}),
        "not ours": made_run(client),
    }
    with tracking.run("prepare", config, child=False):
        pass
    states = {name: client.get_run(run_id).info.status for name, run_id in runs.items()}
    killed = {"dead", "pid taken again", "before a reboot"}
    assert states == {name: "KILLED" if name in killed else "RUNNING" for name in runs}


@pytest.mark.parametrize("name", ["plain", "with blank", "50%25 off", "why?"])
def test_the_uri_of_a_sqlite_store_leads_back_to_its_path(name, tmp_path):
    path = tmp_path / name / "mlflow.db"
    assert store.sqlite_path(store.sqlite_uri(path)) == path


def test_a_relative_sqlite_uri_becomes_absolute_and_another_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///some/mlflow.db")
    assert store.tracking_uri() == f"sqlite:///{tmp_path}/some/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@example.org/x")
    assert store.tracking_uri() == "https://me:secret@example.org/x"
    assert store.shown_uri() == "https://example.org/x"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert store.tracking_uri() == f"sqlite:///{ROOT}/mlflow.db"


def test_a_store_that_cannot_be_written_is_one_line_at_once(tmp_path, monkeypatch, config):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/file/mlflow.db")
    with (
        pytest.raises(InputError, match=r"file/mlflow\.db: cannot be written"),
        tracking.run("prepare", config, child=False),
    ):
        pass


def test_mlflows_file_store_is_refused_in_one_line(tmp_path, monkeypatch, config):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
    with (
        pytest.raises(InputError, match=r"^tracking store .*mlruns: .+$"),
        tracking.run("prepare", config, child=False),
    ):
        pass


def test_experiments_are_chosen_by_the_environment_and_a_deleted_one_is_named(client, config, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    with tracking.run("prepare", config, child=False) as run:
        pass
    mine = client.get_run(run.run_id).info.experiment_id
    assert client.get_experiment(mine).name == "mine"
    client.delete_experiment(mine)
    with pytest.raises(InputError, match=f"mine is deleted.*restore -x {mine}"):
        store.experiment_id(client)


@pytest.mark.slow
def test_system_metrics_are_logged_only_on_request(client, config, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    ids = []
    for wanted in (False, True):
        with tracking.run("pretrain_ae", config, child=False, system_metrics=wanted) as run:
            time.sleep(2)
        ids.append(run.run_id)
    logged = [any(name.startswith("system/") for name in client.get_run(run_id).data.metrics) for run_id in ids]
    assert logged == [False, True]


@pytest.mark.slow
def test_a_store_below_a_folder_with_odd_characters_works(tmp_path, monkeypatch, config):
    folder = tmp_path / "a b%20c"
    folder.mkdir()
    client = use_store(folder, monkeypatch)
    with tracking.run("prepare", config, child=False) as run:
        run.artifact(Path(__file__))
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert (artifacts(run.run_id) / Path(__file__).name).is_file()
    assert sorted(path.name for path in folder.iterdir()) == ["mlartifacts", "mlflow.db", "mlflow.db.lock"]


@pytest.mark.slow
def test_processes_that_open_a_new_store_at_once_all_find_it_whole(tmp_path):
    code = "from dp_lora.tracking.store import connect, experiment_id; print(experiment_id(connect()))"
    environment = {**os.environ, "MLFLOW_TRACKING_URI": store.sqlite_uri(tmp_path / "mlflow.db")}
    command = [sys.executable, "-c", code]
    started = [subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) for _ in "123"]
    found = [process.communicate()[0].strip() for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len(set(found)) == 1
