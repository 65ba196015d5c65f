"""`dvc metrics show`, `plots` and `exp show` print the experiments that have run, and no row or warning of others."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dp_lora.cli import figures, pipelines
from dp_lora.cli.pipelines import PIPELINES
from dp_lora.config import ROOT, load
from tests.support.prepare_call import commit_all

EMNIST = "mnist32-class-dp-eps10"
FILES = {
    "finetune/metrics.json": '{"epsilon": 9.5, "delta": 1e-5}',
    "finetune/epsilon.csv": "step,epsilon\n1,4.5\n2,9.5\n",
    "evaluation/metrics.json": '{"accuracy": 0.9}',
    "evaluation/per_class.csv": "class,accuracy\n0,0.8\n1,1.0\n",
    "evaluation/confusion.png": "no picture, but DVC does not look into it",
    "samples/grid.png": "nor into this",
}
# one stage in the place of all, for DVC may not keep one output of another
MAKE = f"""
import sys
from pathlib import Path
for name, text in {FILES!r}.items():
    path = Path("outputs", sys.argv[1], name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
"""


def tiny(file: str, experiment: str) -> None:
    """Write a pipeline whose one stage makes the files of all real stages; all else of the real dvc.yaml stays."""
    path = Path(file)
    wdir = "." if file == "dvc.yaml" else "../.."
    outs = [f"outputs/{experiment}/{folder}" for folder in ("finetune", "samples", "evaluation")]
    stage = {"wdir": wdir, "cmd": f"{sys.executable} make.py {experiment}", "outs": outs}
    text = yaml.safe_load((ROOT / file).read_text(encoding="utf-8")) | {"stages": {"all": stage}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(text, sort_keys=False), encoding="utf-8")
    shutil.copy((ROOT / file).with_name("params.yaml"), path.parent)


def dvc(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def metrics() -> dict[str, dict]:
    done = dvc("metrics", "show", "--json")
    assert done.stderr == ""
    return {path: found["data"] for path, found in json.loads(done.stdout)[""]["data"].items()}


def plots(*arguments: str) -> set[str]:
    """Names of the plots that DVC shows."""
    done = dvc("plots", *arguments, "--json")
    assert done.stderr == ""
    return set(json.loads(done.stdout)["data"])


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone's pipelines with tiny stages, after the default experiment, which is committed."""
    monkeypatch.chdir(tmp_path)
    for module in (figures, pipelines):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    shutil.copytree(ROOT / ".dvc", tmp_path / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp"))
    shutil.copy(ROOT / ".gitignore", tmp_path)
    (tmp_path / "make.py").write_text(MAKE)
    tiny("dvc.yaml", "mnist5k")
    for name, experiment in (("celebahq", "celebahq-eps10"), ("emnist", EMNIST)):
        tiny(PIPELINES[name].file, experiment)
    subprocess.run(["git", "init", "-q"], check=True)
    dvc("repro", "dvc.yaml")
    commit_all(tmp_path)
    return tmp_path


def test_dvc_shows_what_was_run_the_paper_s_pipelines_once_they_are_scored_and_warns_of_nothing(project):
    own = {"outputs/mnist5k/finetune/metrics.json", "outputs/mnist5k/evaluation/metrics.json"}
    kinds = {"epsilon", "accuracy", "outputs/mnist5k/samples/grid.png", "outputs/mnist5k/evaluation/confusion.png"}
    assert set(metrics()) == own
    table = dvc("metrics", "show").stdout.splitlines()
    assert [line.split()[0] for line in table] == ["Path", *sorted(own, reverse=True)]
    assert plots("show") == plots("diff", "HEAD") == kinds
    shown = dvc("exp", "show", "--csv")
    assert shown.stderr == ""
    rows = list(csv.DictReader(shown.stdout.splitlines()))
    assert {(row["epsilon"], row["accuracy"]) for row in rows} == {("9.5", "0.9")}
    assert not any("outputs/" in name and "metrics.json" in name for name in rows[0] if "mnist5k" not in name)

    config = load(EMNIST)
    figures.show_figures(config)  # the experiment has no scores yet
    assert set(metrics()) == own
    dvc("repro", PIPELINES["emnist"].file)
    figures.show_figures(config)
    of_emnist = {name.replace("mnist5k", EMNIST) for name in own}
    both = metrics()
    assert set(both) == own | of_emnist
    assert both[f"outputs/{EMNIST}/finetune/metrics.json"]["epsilon"] == 9.5
    commit_all(project)
    # DVC shows curves of one name with the file that names them, and pictures by their paths
    named = {
        f"{file}::{name}" for file in ("dvc.yaml", PIPELINES["emnist"].figures) for name in ("epsilon", "accuracy")
    }
    pictures = {name for name in kinds if name.endswith(".png")}
    assert plots("diff", "HEAD") == named | pictures | {name.replace("mnist5k", EMNIST) for name in pictures}
    figures.show_figures(load("mnist5k"))
    assert not (project / "figures").exists()
