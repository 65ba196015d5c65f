"""A run that pauses continues later in the same MLflow run, the same folder and the same ledger."""

import os
import signal
import time

import pytest

from dp_lora import tracking
from dp_lora.cli.common import one_line_errors
from dp_lora.config import load
from dp_lora.tracking import Paused, Terminated
from dp_lora.tracking.process import stop_signals_raise
from dp_lora.training import finetune as module
from dp_lora.training.checkpoints import Keeper, load_checkpoint
from tests.support.finetuning import Heard, house, run  # noqa: F401
from tests.support.tracking_store import all_runs, made_run, use_store


def test_sigusr1_pauses_and_a_signal_that_comes_twice_is_one():
    with pytest.raises(Paused), stop_signals_raise():
        os.kill(os.getpid(), signal.SIGUSR1)
    with stop_signals_raise():
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # the parent got it too, and passes it on
        time.sleep(0.1)


@pytest.mark.parametrize("joined", [True, False])
def test_a_paused_run_waits_where_the_next_process_joins_it_and_is_killed_elsewhere(joined, tmp_path, monkeypatch):
    client = use_store(tmp_path, monkeypatch)
    if joined:
        monkeypatch.setenv("MLFLOW_RUN_ID", made_run(client))
    with pytest.raises(SystemExit) as ended, one_line_errors(), tracking.run("finetune", load("mnist5k")) as first:
        raise Paused("SIGUSR1")
    assert ended.value.code == 130
    paused = client.get_run(first.run_id)
    assert paused.info.status == ("SCHEDULED" if joined else "KILLED")
    assert ("error" in paused.data.tags) == (not joined)
    assert paused.info.end_time is None or not joined


def stopped(run: tracking.TrackedRun) -> None:
    run.metric("private/loss", 1.0, 1)
    raise Terminated("SIGTERM")


def test_the_next_process_goes_on_in_the_same_run_and_forgets_nothing_private(tmp_path, monkeypatch):
    client = use_store(tmp_path, monkeypatch)
    monkeypatch.setenv("MLFLOW_RUN_ID", made_run(client))
    with pytest.raises(Terminated), tracking.run("finetune", load("mnist5k")) as first:
        stopped(first)
    assert "error" in client.get_run(first.run_id).data.tags
    with tracking.run("finetune", load("mnist5k")) as second:
        second.metric("private/gradient_norm", 1.0, 2)
    (ended,) = all_runs(client)
    assert (ended.info.run_id, ended.info.status) == (first.run_id, "FINISHED")
    assert "error" not in ended.data.tags
    assert {"private/loss", "private/gradient_norm"} <= {*ended.data.tags["private"].split(", ")}


def test_a_stop_keeps_the_last_whole_step_and_never_half_of_one(tmp_path):
    import torch

    state = {"w": torch.zeros(1)}
    keeper = Keeper(tmp_path, lambda: state, 0, 0)

    def one_and_a_stop() -> None:
        with keeper.taking(1, 1):
            state["w"] += 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), keeper.saving_when_stopped():
        one_and_a_stop()
    step, counted, tensors = load_checkpoint(tmp_path)
    assert (step, counted, float(tensors["w"])) == (1, 1, 1.0)
    keeper = Keeper(tmp_path, lambda: state, 1, 1)
    with pytest.raises(KeyboardInterrupt), keeper.saving_when_stopped(), keeper.taking(2, 2):
        raise KeyboardInterrupt
    assert load_checkpoint(tmp_path)[0] == 1
    # without a new step it writes nothing
    with pytest.raises(KeyboardInterrupt), keeper.saving_when_stopped():
        raise KeyboardInterrupt
    assert load_checkpoint(tmp_path)[0] == 1


def test_a_stopped_fine_tuning_goes_on_from_the_step_that_it_had_made_not_from_the_last_checkpoint(
    house,  # noqa: F811
    monkeypatch,
):
    real = module.noisy_sum

    def stopping(plan, step, *rest):
        if step == 3:
            raise Paused("SIGUSR1")
        return real(plan, step, *rest)

    monkeypatch.setattr(module, "noisy_sum", stopping)
    with pytest.raises(Paused):
        run(house, "run", "train.checkpoint_every=100")
    monkeypatch.setattr(module, "noisy_sum", real)
    heard = Heard()
    run(house, "run", "train.checkpoint_every=100", heard)
    assert "terminal alone: going on after step 3; the ledger holds 3 of 5 steps" in heard.lines
    assert (house / "run/ledger.jsonl").read_text().count("\n") == 5
