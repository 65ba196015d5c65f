"""What commands import before they work: the cause of a slow start is held, its seconds are `benchmarks.startup`'s."""

import subprocess
import sys

from dp_lora.config import ROOT, STAGES

COMMANDS = sorted(path.stem for path in (ROOT / "dp_lora/commands").glob("[a-z]*.py"))
# packages that take from a tenth of a second to several
HEAVY = {
    "torch", "diffusers", "peft", "transformers", "lightning", "torchvision", "opacus", "scipy", "mlflow", "pandas",
    "pyarrow", "matplotlib", "PIL", "dvc",
}  # fmt: skip
CALL = """
import contextlib, importlib, io, sys
for word in sys.argv[1:]:
    name, *options = word.split()
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
    counting = {"main", "finetune", "sample", "count_params"}
    assert heavy(*(f"{name} --dry-run" for name in STAGES if name not in counting)) == set()


def test_private_pictures_are_prepared_without_waiting_for_what_draws_letters():
    command = [sys.executable, "-c", "import sys, dp_lora.data.prepare; print(*sys.modules)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "scipy", "matplotlib", "pandas", "mlflow"} & set(done.stdout.split())


def test_a_dry_run_of_finetune_imports_what_it_counts_and_calibrates_with_and_no_more():
    found = heavy("finetune --dry-run --overrides compute.device=cpu")
    assert {"torch", "diffusers", "peft", "opacus", "scipy"} <= found
    assert not found & {"mlflow", "lightning", "pandas", "pyarrow", "matplotlib", "dvc"}
