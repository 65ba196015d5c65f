"""One run on several ranks has the same sum, one noise and one ledger, and ends in one line when a rank ends."""

import json
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

from dp_lora.config import ROOT
from dp_lora.config.schema import Compute
from dp_lora.errors import InputError
from dp_lora.launch import _who_ended, make_fabric
from dp_lora.privacy.ledger import Ledger
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.privacy.randomness import Randomness
from dp_lora.privacy.sampling import poisson_draw
from dp_lora.team import Team
from dp_lora.training.run_folder import binding, binding_digest
from tests.support.gloo_steps import CASES, CLIP, one
from tests.support.prepare_call import clone
from tests.support.tiny import TINY, make_base, tiny_config, tiny_dataset

CPU = torch.device("cpu")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
ENVIRONMENT.pop("MLFLOW_RUN_ID", None)
SILENT = "another rank has ended, or has not answered for compute.rank_timeout_minutes"
ENDED = "ledger and checkpoints stand, and a direct call that is typed again goes on"


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Results of gloo_steps with two and three ranks, and of this process alone."""
    folder = tmp_path_factory.mktemp("steps")
    script = [sys.executable, "-m", "tests.support.gloo_steps", str(folder)]
    made = subprocess.run(script, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=280)
    assert made.returncode == 0, made.stderr[-3000:]
    results = {size: torch.load(folder / f"{size}.pt", weights_only=False) for size in (2, 3)}
    return folder, {1: {case: one(case, Team(), folder) for case in CASES}, **results}


def test_every_item_is_in_the_share_of_exactly_one_rank():
    for size in (1, 2, 3, 8):
        for items in ([], [4], [4, 5, 6, 7, 9]):
            shares = [Team(rank, size).share(items) for rank in range(size)]
            assert sorted(item for share in shares for item in share) == items
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("case", CASES)
def test_a_step_gives_the_same_noisy_sum_on_one_two_and_three_ranks(steps, case):
    """Cases: uneven shares, an empty share, an empty draw, persons with several pictures, k draws clipped apart."""
    _, results = steps
    total, facts = results[1][case]
    for size in (2, 3):
        other, other_facts = results[size][case]
        assert total.keys() == other.keys()
        for name in total:
            torch.testing.assert_close(other[name], total[name], rtol=1e-5, atol=1e-6)
        assert other_facts.units == facts.units
        for field in ("loss", "mean_norm", "clipped_share"):
            assert getattr(other_facts, field) == pytest.approx(getattr(facts, field), rel=1e-5, nan_ok=True)
    assert facts.units == {"one unit": 1, "nobody": 0, "persons": 5}.get(case, facts.units)


def test_a_step_on_several_ranks_is_one_line_of_the_ledger(steps):
    folder, results = steps
    for case, (plan, *_) in CASES.items():
        for size in results:
            assert Ledger(folder / f"{case} {size}.jsonl").counted_steps(plan) == 1


def test_where_the_memory_of_one_rank_ends_all_ranks_take_as_few_rows(steps):
    """All ranks use micro-batches of one shape: else a unit that joins moves others to kernels that round otherwise."""
    _, results = steps
    for size in (2, 3):
        rows = results[size]["unlike memory"]
        assert len(rows) == size
        assert {number for rank in rows for number in rank} == {2}


def test_ranks_take_items_by_turns_and_the_first_gets_all_results_in_order(steps):
    _, results = steps
    for size in (2, 3):
        assert results[size]["map"] == [(item, item % size) for item in range(7)]


def test_noise_comes_once_whatever_the_number_of_ranks_and_a_mutant_where_each_rank_adds_it_is_caught(steps):
    _, results = steps

    def p_value(case, size):
        return stats.kstest(results[size][case][0]["w"].numpy(), "norm", args=(0, CLIP)).pvalue

    assert p_value("nobody", 2) > 1e-3
    assert p_value("nobody", 3) > 1e-3
    assert p_value("mutant", 2) < 1e-6
    assert p_value("mutant", 3) < 1e-6


def test_a_rank_with_other_data_or_configuration_is_refused(steps):
    _, results = steps
    for size in (2, 3):
        assert results[size]["same"].startswith("rank 1: has another configuration, code, base model or other data")


def test_a_replay_is_bound_to_the_number_of_ranks_and_a_fresh_run_is_not(tmp_path):
    def digest(overrides):
        return binding_digest(binding(tiny_config(overrides), "d", "b", "cpu"))

    assert digest("") == digest("compute.devices=2") == digest("compute.num_nodes=3")
    seeded = f"privacy.reproducible=true privacy.seed_file={tmp_path}"
    one, two = digest(seeded), digest(f"{seeded} compute.devices=2")
    assert one != two
    assert two == digest(f"{seeded} compute.num_nodes=2")


def test_a_rank_that_hangs_is_lost_after_the_timeout_and_the_line_names_the_setting(steps):
    folder, _ = steps
    line = (folder / "hung").read_text()
    assert line.startswith(f"{SILENT}=0.2 (set more")
    assert ENDED in line
    assert "\n" not in line


@pytest.mark.parametrize("minutes", [0, 1441])
def test_a_timeout_of_no_minutes_or_of_more_than_a_day_is_refused(minutes):
    with pytest.raises(InputError, match=f"rank_timeout_minutes={minutes}: must be a whole number of minutes from 1"):
        tiny_config(f"compute.rank_timeout_minutes={minutes}")


@pytest.mark.parametrize("key", ["compute.devices", "compute.num_nodes"])
def test_no_ranks_are_refused(key):
    with pytest.raises(InputError, match=f"{key}=0: must be a whole number of at least 1"):
        tiny_config(f"{key}=0")


def compute(devices: int = 1, num_nodes: int = 1, minutes: int = 10) -> Compute:
    return Compute("cpu", devices, num_nodes, minutes, 8)


@pytest.mark.parametrize(("minutes", "joining"), [(1, 10), (10, 10), (60, 60)])
def test_ranks_have_the_timeout_to_find_each_other_and_ten_minutes_at_least(minutes, joining):
    assert make_fabric(compute(2, minutes=minutes), CPU).strategy._timeout == timedelta(minutes=joining)


def test_a_launcher_that_starts_more_ranks_than_the_config_says_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="started 2 processes"):
        make_fabric(compute(), CPU)


def test_several_machines_without_a_launcher_must_say_where_the_first_one_is(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="MASTER_ADDR, MASTER_PORT, NODE_RANK"):
        make_fabric(compute(num_nodes=2), CPU)


@pytest.fixture
def house(tmp_path):
    make_base(tmp_path / "base", tiny_config())
    seed = tmp_path / "seed"
    seed.write_bytes(b"s" * 32)
    seed.chmod(0o600)
    return tmp_path


def target(house: Path, run: str, overrides: str, mode: str = "") -> subprocess.CompletedProcess[str]:
    script = [sys.executable, "-m", "tests.support.ranks_target", str(house), run, overrides, mode]
    return subprocess.run(script, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=600)


def errors(process: subprocess.CompletedProcess[str]) -> list[str]:
    """The error lines; a progress bar may stand before the first one."""
    assert "Traceback" not in process.stderr, process.stderr[-3000:]
    return ["error: " + part.splitlines()[0] for part in process.stderr.split("error: ")[1:]]


def weights(house: Path, run: str) -> dict[str, torch.Tensor]:
    release = house / run / "release"
    return load_file(release / "peft/adapter_model.safetensors") | load_file(release / "class_embedding.safetensors")


def counted(house: Path, run: str) -> int:
    plan = PrivacyPlan.from_json(json.loads((house / run / "plan.json").read_text())["plan"])
    return Ledger(house / run / "ledger.jsonl").counted_steps(plan)


FEW = "privacy.batch_size=1 data.n_public=30 privacy.epochs=0.166 privacy.delta=0.01"  # about one of 30 units a step


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", FEW, "privacy.k=3"])
def test_two_and_three_ranks_give_the_weights_of_one_to_1e_6(house, more):
    """All three share one binding here: real replays are bound to their number of ranks, and would share no noise."""
    seeded = f"privacy.reproducible=true privacy.seed_file={house / 'seed'} {more}"
    for size in (1, 2, 3):
        made = target(house, f"on-{size}", f"{seeded} compute.devices={size}")
        assert made.returncode == 0, made.stderr[-3000:]
    alone = weights(house, "on-1")
    for size in (2, 3):
        for name, value in weights(house, f"on-{size}").items():
            assert float((value - alone[name]).abs().max()) < 1e-6, (size, name)
        assert (house / f"on-{size}/ledger.jsonl").read_text().count("\n") == counted(house, "on-1") == 5
    if more == FEW:
        content = json.loads((house / "on-2/plan.json").read_text())
        randomness = Randomness(binding_digest(content["bound"]), (house / "seed").read_bytes())
        rate = content["plan"]["sample_rate"]
        drawn = [len(poisson_draw(30, rate, randomness.numpy("sampling", step))) for step in range(5)]
        assert min(drawn) <= 1  # one of two ranks had an empty share


@pytest.mark.slow
def test_two_ranks_encode_to_the_bytes_that_one_makes(house):
    tiny_dataset(house / "data")
    made = []
    for ranks in (1, 2):  # all in processes of their own, with the same number of threads
        assert target(house, f"latents-{ranks}", f"compute.devices={ranks}", "encode").returncode == 0
        (encoded,) = (house / f"latents-{ranks}").glob("*.npy")
        made.append(encoded.read_bytes())
    assert made[0] == made[1]


@pytest.mark.slow
@pytest.mark.parametrize("again", [2, 1, 3])
def test_a_rank_that_is_killed_ends_the_run_in_one_line_and_a_resume_on_any_number_of_ranks_ends_it(house, again):
    began = time.monotonic()
    broken = target(house, "run", "compute.devices=2", "kill-other-2")
    assert time.monotonic() - began < 200
    assert broken.returncode == 1
    assert errors(broken) == [f"error: rank 1 ended (status -9); {ENDED}"]
    assert counted(house, "run") == 2
    assert not (house / "run/release").exists()
    resumed = target(house, "run", f"compute.devices={again}")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "going on after step 2; the ledger holds 2 of 5 steps" in resumed.stderr
    statement = json.loads((house / "run/release/privacy.json").read_text())
    assert statement["steps"] == counted(house, "run") == 5


@pytest.mark.slow
def test_the_others_end_in_one_line_when_the_first_rank_is_killed(house):
    broken = target(house, "run", "compute.devices=3", "kill-first-2")  # returns when all ranks have closed stderr
    assert broken.returncode == -9
    assert errors(broken) == [f"error: the first process has ended; {ENDED}"]
    assert counted(house, "run") == 2
    assert target(house, "run", "compute.devices=2").returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("who", ["first", "other"])
def test_a_rank_that_hangs_ends_the_run_in_minutes_in_one_line_and_nothing_is_lost(house, who):
    """SIGSTOP makes it hang: it lives and holds its connections, but no longer answers."""
    began = time.monotonic()
    broken = target(house, "run", "compute.devices=3 compute.rank_timeout_minutes=1", f"hang-{who}-2")
    assert time.monotonic() - began < 200
    assert broken.returncode == (1 if who == "other" else -9)
    (line,) = errors(broken)
    assert f"{SILENT}=1 (set more" in line
    assert ENDED in line
    assert counted(house, "run") == 2
    resumed = target(house, "run", "compute.devices=2")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "going on after step 2; the ledger holds 2 of 5 steps" in resumed.stderr
    assert counted(house, "run") == 5


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with a tiny base and tiny private data."""
    folder = tmp_path_factory.mktemp("house") / "project"
    clone(ROOT, folder)
    make_base(folder / "outputs/letters/ldm", tiny_config())
    tiny_dataset(folder / "outputs/mnist5k/data")
    return folder


def command(project: Path, *words: str, more: str = "", launcher: tuple[str, ...] = ()) -> str:
    """Run an entry point and return its output, which must be one line."""
    environment = {**ENVIRONMENT, "PYTHONPATH": str(project), "MLFLOW_TRACKING_URI": f"sqlite:///{project}/mlflow.db"}
    overrides = f"{TINY} compute.device=cpu sampling.batch_size=1 {more}"
    made = subprocess.run(
        [sys.executable, "-m", *launcher, *words, "--overrides", overrides],
        cwd=project, env=environment, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-3000:]
    (line,) = made.stdout.splitlines()  # the first rank alone prints
    return line


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")


@pytest.mark.slow
def test_a_rank_that_ends_before_it_joins_ends_the_run_in_one_line(house):
    broken = target(house, "run", "compute.devices=2", "end-at-start")
    assert broken.returncode == 1
    assert errors(broken) == [f"error: rank 1 ended (status 3); {ENDED}"]
    assert not (house / "run").exists()


def test_a_rank_that_has_done_its_share_is_not_taken_for_lost():
    """The first rank may still write for minutes after the last batch."""
    codes = {1: 0, 2: 5}
    ended = {n: subprocess.Popen([sys.executable, "-c", f"raise SystemExit({code})"]) for n, code in codes.items()}
    for process in ended.values():
        process.wait()
    assert _who_ended({1: ended[1]}) is None
    assert str(_who_ended(ended)).startswith("rank 2 ended (status 5)")


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "eps"), [((), "10"), (TORCHRUN, "5")])
def test_the_command_line_works_on_two_ranks_with_and_without_torchrun(project, launcher, eps):
    from mlflow import MlflowClient

    before = set((project / "runs").glob("*/ledger.jsonl"))
    two = "compute.devices=2"
    fine_tuned = command(project, "entrypoints.finetune", "--eps", eps, more=two, launcher=launcher)
    assert "differentially private, add-or-remove-one" in fine_tuned
    release = fine_tuned.partition(":")[0]
    (ledger,) = set((project / "runs").glob("*/ledger.jsonl")) - before
    assert ledger.read_text().count("\n") == 5
    # a rank draws whole batches, so each image has the same bits as with one process
    images = []
    for more, how in ((two, launcher), ("", ())):
        drawn = command(project, "entrypoints.sample", "--adapter", release, more=more, launcher=how)
        images.append((project / drawn.partition(":")[0]).with_name("samples.npz").read_bytes())
    assert images[0] == images[1]
    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments)
    assert len(runs) == 3 * (len(before) + 1)
    assert {run.info.status for run in runs} == {"FINISHED"}
