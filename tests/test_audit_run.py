"""Canaries among the private pictures of a whole fine-tuning: they are seen, convict its faults, and leave no trace."""

import importlib
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from benchmarks.mutants import Case, clipped_by_micro_batch, no_noise, times_the_rate, wrong
from dp_lora.commands.audit import main
from dp_lora.config import ROOT, load, write_resolved
from dp_lora.files import digest_folder, read_json
from dp_lora.models.folder import load_model
from dp_lora.models.info import model_digest
from dp_lora.privacy.audit_record import audits_of
from dp_lora.privacy.randomness import Randomness
from dp_lora.training import audit as module
from dp_lora.training import finetune as finetune_module
from dp_lora.training.audit import audit_with
from dp_lora.training.finetune import PrivateData, units_of
from dp_lora.training.plan import make_plan
from dp_lora.training.resolved import stated_info
from dp_lora.training.run_folder import binding
from dp_lora.training.step_code import code_digest
from tests.support.project_root import use_root
from tests.support.text2image import captions_of
from tests.support.tiny import TINY, make_base, tiny_config, tiny_dataset, tiny_latents
from tests.support.tiny_pipelines import BUILD, SIZE, make_pipeline
from tests.support.tracking_store import all_runs

CPU = torch.device("cpu")
N = 32
SECRET = b"0123456789abcdef"
SETTINGS = "audit.canaries=400 privacy.eps=3 privacy.delta=1e-5 privacy.epochs=2 privacy.max_grad_norm=0.01"


@pytest.fixture(autouse=True)
def quick_worlds(monkeypatch):
    """Make few runs of the two worlds: test_privacy_audit.py audits the divisor with enough runs."""
    real = module.spreads
    monkeypatch.setattr(module, "spreads", lambda *arguments: real(*arguments, runs=20))


def audited(tmp_path, overrides="", persons=None):
    """An audit of a tiny fine-tuning, and its working folder."""
    config = tiny_config(f"{SETTINGS} {overrides}")
    make_base(tmp_path / "base", config)
    latents, labels = tiny_latents(N)
    data = PrivateData(latents, labels, units_of(N, persons, config.privacy.unit))
    bound = binding(config, "0" * 64, model_digest(tmp_path / "base"), "cpu")
    folder = tmp_path / "working"
    names = {"path": "base", "digest": bound["base"]}
    model = load_model(tmp_path / "base")
    return audit_with(config, model, names, data, bound, folder, CPU, randomness=Randomness("audit", SECRET)), folder


def assert_seen(audit):
    """Check that the canaries enter the sums as units do, and that the noise is as stated."""
    assert not audit.refuted, audit.verdict
    assert not audit.jump.is_below()
    assert audit.jump.half < 0.7
    assert audit.noise.value == pytest.approx(1.0, abs=0.05)


def test_canaries_are_seen_in_a_fine_tuning_of_which_nothing_is_left(tmp_path):
    found, folder = audited(tmp_path)
    assert_seen(found.audit)
    assert found.audit.claimed == pytest.approx(3.0, rel=0.01)
    assert not folder.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("fault", "words"),
    [pytest.param(no_noise, "noise is 0.000", marks=pytest.mark.slow), (times_the_rate, "rate times jump")],
)
def test_faults_of_the_private_step_are_convicted_through_the_whole_fine_tuning(tmp_path, fault, words):
    plan = make_plan(tiny_config(SETTINGS))
    # `wrong` patches the functions that the step calls: finetune has imported the step itself by name
    with wrong(Case("fault", plan, fault)):
        found, _ = audited(tmp_path, "privacy.epochs=1")
    assert words in found.audit.verdict


def test_a_working_folder_goes_also_where_the_fine_tuning_stops(tmp_path, monkeypatch):
    real = finetune_module.noisy_sum

    def stopping(plan, step, *rest):
        if step == 1:
            raise KeyboardInterrupt
        return real(plan, step, *rest)

    monkeypatch.setattr(finetune_module, "noisy_sum", stopping)
    with pytest.raises(KeyboardInterrupt):
        audited(tmp_path)
    assert not (tmp_path / "working").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        "compute.precision=bfloat16",
        "privacy.k=4 lora.train=AB",
        "compute.physical_batch_size=3",
    ],
)
def test_canaries_are_seen_under_other_settings_too(tmp_path, overrides):
    found, _ = audited(tmp_path, overrides)
    assert_seen(found.audit)


@pytest.mark.slow
def test_canaries_are_seen_where_a_step_backs_off_from_the_end_of_memory(tmp_path, monkeypatch):
    real = PrivateData.loss_factory
    failed = []

    def failing(self, *arguments):
        factory = real(self, *arguments)

        def made(draws):
            loss = factory(draws)

            def limited(copies, rows):
                if len(rows.slot) > 10:
                    failed.append(len(rows.slot))
                    raise torch.OutOfMemoryError("CUDA out of memory, pretended")
                return loss(copies, rows)

            return limited

        return made

    monkeypatch.setattr(PrivateData, "loss_factory", failing)
    found, _ = audited(tmp_path)
    assert failed
    assert_seen(found.audit)


@pytest.mark.slow
def test_canaries_are_seen_on_several_ranks(tmp_path):
    make_base(tmp_path / "base", tiny_config())
    overrides = f"{SETTINGS} compute.devices=2 compute.device=cpu"
    script = [sys.executable, "-m", "tests.support.ranks_target", str(tmp_path), "audited", overrides, "audit"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = read_json(tmp_path / "audited.json")
    assert not found["refuted"], found["verdict"]
    assert found["jump"]["value"] == pytest.approx(1.0, abs=2 * found["jump"]["half"])
    assert found["noise"]["value"] == pytest.approx(1.0, abs=0.05)
    assert not (tmp_path / "audited").exists()


@pytest.mark.slow
def test_persons_of_canaries_are_seen_and_their_clipping_by_micro_batch_is_convicted(tmp_path):
    persons = [f"p{picture // 3}" for picture in range(N)]
    overrides = "privacy.unit=person data.n_public=11 privacy.batch_size=2 compute.physical_batch_size=4"
    found, _ = audited(tmp_path, overrides, persons)
    assert_seen(found.audit)
    with wrong(Case("fault", found.plan, clipped_by_micro_batch)):
        found, _ = audited(tmp_path, overrides, persons)
    assert found.audit.jump.is_above()
    # a canary's 12 rows lie in 3 or 4 micro-batches of 4 rows: the persons of 3 pictures before them shift the cut
    jump = found.audit.jump
    assert 3 - 2 * jump.half < jump.value < 4 + 2 * jump.half


@pytest.mark.slow
@pytest.mark.parametrize("name", list(BUILD))
def test_canaries_are_seen_with_each_family_of_bases(tmp_path, name):
    base = make_pipeline(tmp_path / name, name)
    model = load_model(base)
    captioned = "data.captions=true data.classes=[] sampling.prompts='a sun|a tree'"
    learnt = "data.classes=[a]" if model.family.of_classes else captioned
    config = load(
        "folder",
        {},
        f"data.path=nowhere {learnt} data.n_public=40 data.size=32 data.channels=3 "
        "lora.rank=2 privacy.batch_size=8 train.timestep_min=0 train.grid_every=0 "
        f"model.privacy_status=public compute.device=cpu {SETTINGS} model.base={base}",
    )
    model = replace(model, info=stated_info(config, base))
    latents = np.random.default_rng(1).standard_normal((6, *model.latent_shape(SIZE)), dtype=np.float32)
    captions = captions_of(config, model, tmp_path / "captions")
    data = PrivateData(latents, np.zeros(6, np.int64), [[i] for i in range(6)], captions)
    bound = binding(config, "0" * 64, model_digest(base), "cpu")
    names = {"path": str(base), "digest": bound["base"]}
    coins = Randomness("audit", SECRET)
    found = audit_with(config, model, names, data, bound, tmp_path / "working", CPU, randomness=coins)
    assert_seen(found.audit)
    assert not (tmp_path / "working").exists()


def test_audits_by_the_command_are_linked_and_the_card_has_that_of_the_step_alone(tmp_path, monkeypatch):
    client = use_root(tmp_path, monkeypatch)
    make_base(tmp_path / "base", tiny_config())
    tiny_dataset(tmp_path / "outputs/mnist5k/data")
    config = load("mnist5k", {}, f"{TINY} {SETTINGS} model.base=base audit.level=run")
    write_resolved(config, tmp_path / "resolved.yaml")

    def called(stage, out, level="run"):
        write_resolved(replace(config, audit=replace(config.audit, level=level)), tmp_path / "resolved.yaml")
        command = importlib.import_module(f"dp_lora.commands.{stage}").main
        given = ["--resolved", tmp_path / "resolved.yaml", "--out", tmp_path / "outputs/mnist5k" / out]
        result = CliRunner().invoke(command, [str(argument) for argument in given])
        assert result.exit_code == 0, result.output
        return all_runs(client)[0]

    step = called("audit", "step", "step")
    made = called("finetune", "finetune")
    assert made.data.tags["made_from.audit"] == step.info.run_id
    release = tmp_path / "outputs/mnist5k/finetune/release"
    (audit,) = read_json(release / "privacy.json")["audits"]
    assert audit["verdict"] == step.data.tags["verdict"]
    assert f"Audit of {audit['date']} at epsilon 3" in (release / "README.md").read_text()

    kept, records = digest_folder(release), (tmp_path / "runs/audits/mnist5k.jsonl").read_bytes()
    whole = called("audit", "whole")
    # it was computed on private pictures: it stays with the operator, and in no file that a release reads
    private = whole.data.tags["private"].split(", ")
    assert {"verdict", "audit.json", *(name for name in whole.data.metrics if "audit" in name)} <= {*private}
    assert (digest_folder(release), (tmp_path / "runs/audits/mnist5k.jsonl").read_bytes()) == (kept, records)
    assert not list((tmp_path / "runs/working").glob("audit-*"))
    assert whole.data.tags["audit_of"] == step.data.tags["audit_of"]  # a later fine-tuning links it


def test_the_command_names_what_is_missing_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    result = CliRunner().invoke(main, ["--overrides", "audit.level=run model.base=outputs/nowhere"])
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: model.base=outputs/nowhere")
    result = CliRunner().invoke(main, ["--eps", "inf"])
    assert result.exit_code == 1
    assert "claims nothing" in result.stderr


def test_the_command_audits_the_step_records_it_and_shows_it_in_the_ui(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.setattr("dp_lora.commands.audit.audits_path", lambda _config: tmp_path / "audits" / "mnist5k.jsonl")
    overrides = "audit.canaries=400 privacy.batch_size=1000 privacy.epochs=2"
    result = CliRunner().invoke(main, ["--eps", "3", "--overrides", overrides])
    assert result.exit_code == 0, result.output
    verdict = result.stdout.strip().splitlines()[-1]
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    folder = ROOT / "runs" / run.info.run_id
    try:
        assert run.data.tags["verdict"] == verdict
        assert run.data.metrics["audit_epsilon_bound"] <= run.data.metrics["audit_epsilon_ceiling"]
        assert run.data.metrics["audit_noise_low"] < run.data.metrics["audit_noise_high"]
        # an audit depends on public numbers and chance alone, so it names nothing private
        assert not {name for name in run.data.tags.get("private", "").split(", ") if "audit" in name}
        assert sorted(path.name for path in (folder / "audit").iterdir()) == ["audit.json", "audit.png"]
        config = load("mnist5k", {"eps": "10"}, overrides)
        (found,) = audits_of(tmp_path / "audits" / "mnist5k.jsonl", make_plan(config), code_digest())
        assert found["verdict"] == verdict
        assert run.data.tags["audit_of"] == found["settings"]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
