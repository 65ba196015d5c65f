"""What commands import before they work: the cause of a slow start is held, its seconds are `benchmarks.startup`'s."""

import subprocess
import sys
from dataclasses import asdict

import pytest

from dp_lora.config import ROOT, STAGES
from dp_lora.files import write_json
from dp_lora.models.flops import count_operations
from dp_lora.models.meta import meta_networks
from dp_lora.models.operations import FILE
from tests.support.tiny import TINY, make_base, tiny_config

COMMANDS = sorted(path.stem for path in (ROOT / "dp_lora/commands").glob("[a-z]*.py"))
# packages that take from a tenth of a second to several
HEAVY = {
    "torch", "diffusers", "peft", "transformers", "lightning", "torchvision", "opacus", "scipy", "mlflow", "pandas",
    "pyarrow", "matplotlib", "PIL", "dvc",
}  # fmt: skip
CALL = """
import contextlib, importlib, io, shlex, sys
for word in sys.argv[1:]:
    name, *options = shlex.split(word)
    with contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module(f"dp_lora.commands.{name}").main.main(options, standalone_mode=False)
print(*{module.split(".")[0] for module in sys.modules})
"""


def heavy(*calls: str) -> set[str]:
    """The heavy packages that a process has imported after these calls, such as `sample --help`."""
    command = [sys.executable, "-c", CALL, *calls]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return HEAVY & set(done.stdout.split())


def test_help_of_every_command_imports_nothing_heavy():
    assert {*STAGES, "reproduce", "resolve", "ui", "upload", "compare"} == set(COMMANDS)
    assert heavy(*(f"{name} --help" for name in COMMANDS)) == set()


def test_a_dry_run_that_counts_nothing_imports_nothing_heavy():
    counting = {"main", "finetune", "sample", "count_params", "audit"}
    assert heavy(*(f"{name} --dry-run" for name in STAGES if name not in counting)) == set()


def test_private_pictures_are_prepared_without_waiting_for_what_draws_letters():
    command = [sys.executable, "-c", "import sys, dp_lora.data.prepare; print(*sys.modules)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "scipy", "matplotlib", "pandas", "mlflow"} & set(done.stdout.split())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Overrides that name a base which is there and states its operations, as the stages leave it."""
    folder, config = tmp_path_factory.mktemp("house") / "base", tiny_config()
    make_base(folder, config)
    write_json(folder / FILE, asdict(count_operations(*meta_networks(config, folder))))
    return f"--overrides='{TINY} model.base={folder}'"


def test_a_dry_run_that_counts_a_base_which_is_there_builds_no_network(base):
    assert heavy(f"count_params --dry-run {base}", f"sample --dry-run {base}") == set()


@pytest.mark.parametrize("name", ["finetune", pytest.param("main", marks=pytest.mark.slow)])
def test_a_dry_run_of_a_fine_tuning_imports_what_it_calibrates_with_and_no_more(name, base):
    assert heavy(f"{name} --dry-run {base}") == {"scipy"}
    assert heavy(f"{name} --dry-run {base[:-1]} privacy.accounting=published privacy.k=2'") == {"scipy"}


def test_parameters_of_a_base_that_is_there_are_counted_without_torch_and_tracked(base, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    found = heavy(f"count_params --out={tmp_path}/out {base}")
    assert (tmp_path / "out" / "count_params.json").exists()
    assert "mlflow" in found
    assert not found & {"torch", "diffusers", "peft", "transformers", "lightning", "opacus", "matplotlib", "dvc"}


@pytest.mark.slow
def test_without_a_base_a_dry_run_of_finetune_imports_what_it_counts_and_calibrates_with_and_no_more():
    found = heavy("finetune --dry-run --config celebahq-eps10 --overrides compute.device=cpu")
    assert {"torch", "diffusers", "scipy"} <= found
    assert not found & {"mlflow", "lightning", "pandas", "pyarrow", "matplotlib", "dvc"}
