"""A small run of the default pipeline in a copy of the project: it needs no network, and writes only what it says."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.prepare_call import commit_all
from tests.support.tiny_project import EXPERIMENT, run, tiny_project

pytestmark = pytest.mark.slow

# a user and network namespace with no interface but a loopback that is down
NO_NETWORK = ("unshare", "--map-root-user", "--net")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tiny_project(tmp_path_factory.mktemp("chain") / "project")
    commit_all(folder)
    return folder


def require_no_network() -> None:
    """Skip if the machine gives no namespaces; fail if the namespace has another interface than its loopback."""
    try:
        subprocess.run([*NO_NETWORK, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no network namespaces on this machine")
    shown = subprocess.run([*NO_NETWORK, "cat", "/proc/net/dev"], check=True, capture_output=True, text=True).stdout
    assert {line.split(":")[0].strip() for line in shown.splitlines() if ":" in line} <= {"lo"}


def files(project: Path) -> dict[str, tuple[int, int]]:
    """Time and size of every file of the project, except those of git and DVC."""
    found = {}
    for path in project.rglob("*"):
        name = path.relative_to(project).as_posix()
        if path.is_file() and not name.startswith((".git/", ".dvc/")) and "__pycache__" not in path.parts:
            found[name] = (path.stat().st_mtime_ns, path.stat().st_size)
    return found


def written(before: dict, after: dict) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def listed(project: Path) -> list[str]:
    """The places that `main` would write, by its own dry run; the last is the run in the store."""
    result = run(project, "entrypoints.main", "--config", EXPERIMENT, "--dry-run")
    assert result.returncode == 0, result.stderr[-2000:]
    line = next(line for line in result.stdout.splitlines() if line.startswith("would write: "))
    # DIGEST stands for a name that is unknown before the run
    items = line.removeprefix("would write: ").split(", ")
    return [item.split(" (")[0].removesuffix("/DIGEST") for item in items]


def is_below(name: str, place: str) -> bool:
    return name == place or name.startswith(f"{place}/")


def of_the_store(name: str) -> bool:
    """Whether a file belongs to MLflow: the database, its lock, artifacts."""
    return name.startswith(("mlflow.db", "mlruns/", "mlartifacts/"))


def test_the_chain_runs_without_a_network_writes_what_its_dry_run_lists_and_a_second_call_nothing(project):
    require_no_network()
    *places, _ = listed(project)
    assert not (project / "mlflow.db").exists()
    before = files(project)
    made = run(project, "entrypoints.main", "--config", EXPERIMENT, before=NO_NETWORK)
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-3000:]
    after = files(project)
    new = written(before, after)
    own = {name for name in new if not of_the_store(name)}
    assert [name for name in sorted(own) if not any(is_below(name, place) for place in places)] == []
    for place in places:
        assert any(is_below(name, place) for name in own), f"{place}: listed, not written"
    again = run(project, "entrypoints.main", "--config", EXPERIMENT, before=NO_NETWORK)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "nothing to do" in again.stdout
    assert {name for name in written(after, files(project)) if name.startswith(("outputs/", "data/"))} == set()
    commit_all(project)


def test_finetune_under_mlflow_run_writes_to_its_own_run_and_mlflow_alone(project):
    before = files(project)
    command = ("run", ".", "-b", "native", "-e", "finetune", "-P", f"config={EXPERIMENT}", "-P", "eps=5")
    result = run(project, "mlflow", *command)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    new = written(before, files(project))
    shared = {"runs/working", "runs/.heads", "runs/operator"}
    folders = {"/".join(name.split("/")[:2]) for name in new if name.startswith("runs/")} - shared
    assert len(folders) == 1, folders
    (own,) = folders
    assert (project / own / "release/privacy.json").exists()
    # beside its own folder the run writes encoded latents, which the next run uses and anybody may delete at any time,
    # the ledger's heads, and the operator's notes
    places = (f"{own}/", f"runs/working/private/{EXPERIMENT}/latents/", "runs/.heads/", own.replace("/", "/operator/"))
    assert [name for name in sorted(new) if not name.startswith(places) and not of_the_store(name)] == []


def test_an_experiment_of_dvc_at_another_eps_reruns_finetune_and_what_follows_and_is_compared(project):
    result = run(project, "dvc", "exp", "run", "-S", "eps=2", "--name", "lower")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    ran = re.findall(r"^Running stage '(?:.*:)?(\w+)'", result.stdout, re.MULTILINE)
    assert ran == ["resolve", "finetune", "sample", "fid"]
    shown = run(project, "dvc", "exp", "show", "--csv")
    rows = {row["Experiment"]: row for row in csv.DictReader(shown.stdout.splitlines())}
    assert 0 < float(rows["lower"]["epsilon"]) <= 2, rows
    plots = run(project, "dvc", "plots", "diff", "HEAD", "lower", "--json")
    assert plots.returncode == 0, plots.stderr[-2000:]
    revisions = {
        revision
        for plot in json.loads(plots.stdout)["data"].values()
        for item in plot
        for revision in item.get("revisions", [])
    }
    assert {"HEAD", "lower"} <= revisions


def test_an_experiment_in_dvc_s_queue_keeps_its_ledger_and_its_run_and_leaves_no_private_picture(project):
    ledgers, store = set(project.glob("runs/*/ledger.jsonl")), (project / "mlflow.db").stat().st_mtime_ns
    # DVC starts its worker as `dvc`, which it must find in PATH
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    queued = run(project, "dvc", "exp", "run", "--queue", "-S", "eps=3", "--name", "queued")
    assert queued.returncode == 0, queued.stdout[-2000:] + queued.stderr[-3000:]
    result = run(project, "dvc", "exp", "run", "--run-all", "--jobs", "1", PATH=path)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    shown = run(project, "dvc", "exp", "show", "--csv")
    rows = {row["Experiment"]: row for row in csv.DictReader(shown.stdout.splitlines())}
    assert 2 < float(rows["queued"]["epsilon"]) <= 3, result.stdout[-3000:]
    (own,) = set(project.glob("runs/*/ledger.jsonl")) - ledgers
    assert json.loads((own.parent / "plan.json").read_text())["bound"]["config"]["privacy"]["eps"] == 3
    assert (project / "mlflow.db").stat().st_mtime_ns > store
    assert [path for path in (project / ".dvc/tmp/exps").rglob("*") if path.suffix in (".png", ".parquet")] == []
