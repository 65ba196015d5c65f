"""Commands import nothing heavy before they work, the cause of a slow start; `benchmarks.startup` measures seconds."""

import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from dp_lora.config import ROOT, STAGES, load
from dp_lora.files import read_json, write_json
from dp_lora.models.counted_rows import COUNTED, row_before
from dp_lora.models.estimate import base_operations
from dp_lora.models.flops import count_operations
from dp_lora.models.info import model_digest
from dp_lora.models.meta import meta_networks
from dp_lora.models.operations import FILE, pipeline_key, read_operations, write_operations
from dp_lora.models.pipeline_index import family_of
from dp_lora.models.shapes import base_shapes
from dp_lora.models.shipped import FOLDER, counted_before, file_of
from tests.support.counted import KINDS, STUDIES, recount, recount_rows
from tests.support.tiny import TINY, make_base, tiny_config
from tests.support.tiny_pipelines import make_pipeline

COMMANDS = sorted(path.stem for path in (ROOT / "dp_lora/commands").glob("[a-z]*.py"))
# packages that take from a tenth of a second to several seconds to import
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
    """The heavy packages that a process has imported after these calls (such as `sample --help`)."""
    command = [sys.executable, "-c", CALL, *calls]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return HEAVY & set(done.stdout.split())


def test_help_of_every_command_imports_nothing_heavy():
    assert {*STAGES, "reproduce", "resolve", "ui", "upload"} == set(COMMANDS)
    assert heavy(*(f"{name} --help" for name in COMMANDS)) == set()


def test_a_dry_run_that_counts_nothing_imports_nothing_heavy():
    counting = {"main", "finetune", "sample", "count_params", "audit", "study"}
    assert heavy(*(f"{name} --dry-run" for name in STAGES if name not in counting)) == set()


def imported_with(module: str) -> set[str]:
    """All modules that a process has imported after one."""
    command = [sys.executable, "-c", f"import sys, {module}; print(*sys.modules)"]
    return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())


def test_private_pictures_are_prepared_without_waiting_for_what_draws_letters():
    assert not {"torch", "scipy", "matplotlib", "pandas", "mlflow"} & imported_with("dp_lora.data.prepare")


def test_a_study_reads_audits_of_the_present_code_and_writes_its_report_without_waiting_for_torch():
    modules = "dp_lora.training.step_code, dp_lora.study.report, dp_lora.study.audits, dp_lora.study.costs"
    assert not {"torch", "diffusers", "peft"} & imported_with(modules)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Overrides that name an existing base with stated operations, as the stages write it."""
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


def test_without_a_base_a_dry_run_of_a_shipped_config_builds_no_network():
    calls = [f"finetune --dry-run --config {name} --overrides compute.device=cpu" for name in KINDS]
    assert heavy(*calls, *(f"count_params --dry-run --config {name}" for name in KINDS)) == {"scipy"}
    assert heavy(*(f"sample --dry-run --config {name} --overrides compute.device=cpu" for name in KINDS)) == set()


@pytest.mark.parametrize("name", [KINDS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in KINDS[1:])])
def test_the_counts_that_are_shipped_are_those_of_the_networks(name):
    config = load(name)
    assert read_json(file_of(config)) == recount(config), "`python -m tests.support.counted` writes what is right"
    assert {path.name for path in FOLDER.glob("*")} == {COUNTED.name, *(file_of(load(kind)).name for kind in KINDS)}
    names = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    for other in names & {"cin256", "standin", "emnist32-conditional"} | {n for n in names if "-eps" in n}:
        assert counted_before(load(other)) is not None, other
    assert counted_before(load(name, {}, "ldm.epochs=7 ldm.lr=1e-4")) is not None
    assert counted_before(load(name, {}, "ldm.layers_per_block=5")) is None


def test_a_pipeline_that_states_its_operations_is_counted_without_its_networks(tmp_path, monkeypatch):
    base = make_pipeline(tmp_path / "sd", "sd")
    settings = (
        f"data.path={tmp_path}/pictures data.captions=true data.classes=[] data.n_public=400 data.size=32 "
        f"data.channels=3 sampling.prompts=sun privacy.batch_size=40 model.privacy_status=public model.base={base}"
    )
    config = load("folder", {}, settings)
    counted, key = base_operations(config, base, family_of(base)), pipeline_key(base, 32)
    before = model_digest(base)
    write_operations(base, counted, key)
    assert model_digest(base) == before  # the file is no part of the model
    assert read_operations(base, key) == counted
    assert read_operations(base, pipeline_key(base, 64)) is None  # other pictures take other operations
    monkeypatch.setattr("dp_lora.models.meta.meta_networks", None)
    assert base_operations(config, base, family_of(base)) == counted


@pytest.mark.parametrize("study", [STUDIES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in STUDIES[1:])])
def test_the_rows_that_are_shipped_are_those_that_the_dry_run_of_a_shipped_study_tells_of(study):
    shipped, counted = read_json(COUNTED), recount_rows(study)
    assert {key: shipped.get(key) for key in counted} == counted, "`python -m tests.support.counted` writes it"


def test_a_dry_run_of_a_shipped_study_builds_no_network():
    assert heavy("study --dry-run --study mnist5k --overrides compute.device=cpu") == {"scipy"}


def test_a_row_that_was_counted_beforehand_is_not_taken_for_another():
    config = load("mnist5k", {}, "lora.rank=8")
    shapes = base_shapes(config, ROOT / "no such base")
    assert row_before(config, shapes) is not None
    settings = ("lora.rank=16", "lora.rank=8 lora.targets=study", "lora.rank=8 compute.precision=float32")
    assert all(row_before(load("mnist5k", {}, other), shapes) is None for other in settings)
    smaller = replace(shapes, denoiser={**shapes.denoiser, "conv_in.weight": (1, 1, 1, 1)})
    assert row_before(config, smaller) is None


@pytest.mark.slow
def test_without_a_base_a_dry_run_of_another_network_imports_what_it_counts_and_calibrates_with_and_no_more():
    other = "'compute.device=cpu ldm.layers_per_block=1'"
    found = heavy(f"finetune --dry-run --config celebahq-eps10 --overrides={other}")
    assert {"torch", "diffusers", "scipy"} <= found
    assert not found & {"mlflow", "lightning", "pandas", "pyarrow", "matplotlib", "dvc"}
