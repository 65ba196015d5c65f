"""`pip install .` gives the package `dp_lora` and the command `dp-lora`, which works outside a clone."""

import os
import shutil
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
from PIL import Image

from dp_lora.__main__ import OTHERS
from dp_lora.config import ROOT, STAGES, config_names
from dp_lora.study.grid import study_names
from tests.support.tiny import TINY


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, installed in an environment of its own; it uses the other packages of the tests' environment."""
    folder = tmp_path_factory.mktemp("installed")
    source, environment = folder / "source", folder / "environment"
    for name in ("dp_lora", "configs"):  # a copy, because a build writes beside the code
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (site,) = (environment / "lib").glob("python*/site-packages")
    python = environment / "bin/python"
    subprocess.run([*pip, "--python", python, "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    # a .pth line here finds the packages there, but not the clone, which another .pth there adds
    needed = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "needed.pth").write_text(f"{needed}\n", encoding="utf-8")
    return SimpleNamespace(command=environment / "bin/dp-lora", wheel=wheel, site=site)


@pytest.fixture
def place(tmp_path):
    """A user's folder with ten pictures in each of two classes."""
    for name in ("cat", "dog"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("L", (16, 16), 20 * i + len(name)).save(tmp_path / "mine" / name / f"{i}.png")
    return tmp_path


def called(installed, place, *arguments):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "PYTHON"))}
    command = [installed.command, *arguments]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)


def test_the_wheel_holds_one_package_with_the_shipped_configs(installed):
    names = zipfile.ZipFile(installed.wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"dp_lora"}
    shipped = {name.removeprefix("dp_lora/configs/") for name in names if name.startswith("dp_lora/configs/")}
    assert shipped == {f"{name}.yaml" for name in (*config_names(), "base")} | {
        f"studies/{name}.yaml" for name in study_names()
    }


def test_the_command_lists_every_command_and_refuses_in_one_line(installed, place):
    said = called(installed, place, "--help")
    assert said.returncode == 0, said.stderr
    assert {line.split()[0] for line in said.stdout.splitlines() if line.startswith("  ")} >= {*STAGES, *OTHERS}
    wrong = called(installed, place, "finetune", "--config", "mnist6k")
    assert (wrong.returncode, wrong.stderr.splitlines()) == (
        1, ["error: config=mnist6k: no such experiment; did you mean mnist5k or emnist?"]
    )  # fmt: skip


@pytest.mark.slow
def test_the_command_prepares_and_counts_outside_of_a_clone(installed, place):
    overrides = f"{TINY} data.path=mine data.classes=[cat,dog]"
    prepared = called(installed, place, "prepare", "--config", "folder", "--overrides", overrides)
    assert prepared.returncode == 0, prepared.stderr
    assert (place / "outputs/folder/data/metadata.parquet").exists()
    assert (place / "outputs/letters/data/metadata.parquet").exists()

    # the user's own config works beside the shipped ones
    (place / "configs").mkdir()
    (place / "configs/own.yaml").write_text("extends: mnist5k\nlora: {rank: 3}\n", encoding="utf-8")
    counted = called(installed, place, "count_params", "--config", "own", "--dry-run")
    assert counted.returncode == 0, counted.stderr
    assert "rank: 3" in counted.stdout
    assert not (installed.site / "runs").exists()


@pytest.mark.parametrize(
    "arguments",
    [["main"], ["reproduce", "0" * 32], pytest.param(["pretrain_ldm"], marks=pytest.mark.slow)],
)
def test_what_needs_dvc_says_so_in_one_line_and_leaves_nothing(arguments, installed, place):
    (place / "outputs/letters/data").mkdir(parents=True)  # `prepare` would make it
    before = set(place.rglob("*"))
    said = called(installed, place, *arguments)
    assert said.returncode == 1
    (line,) = said.stderr.splitlines()
    assert line.startswith("error: ")
    assert "needs a clone of the project" in line
    assert set(place.rglob("*")) == before
