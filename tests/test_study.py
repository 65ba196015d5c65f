"""The study's experiments: each differs from its parent in one thing, has the study's size, and takes a step."""

import functools
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

from dp_lora.config import ROOT, STAGES, config_names, flatten, load
from dp_lora.data.layout import Picture, write_dataset
from dp_lora.data.png import encode_png
from dp_lora.models.adapters import apply_adapter
from dp_lora.models.counting import count_parameters
from dp_lora.models.folder import load_model
from dp_lora.models.shapes import base_shapes
from dp_lora.training.finetune import PrivateData, finetune
from dp_lora.training.run_folder import binding, open_run_folder
from tests.support.golden import golden_json
from tests.support.public_stage import Heard
from tests.support.tiny import make_base

COUNTS = golden_json("parameter-counts.json")
NOWHERE = Path("no such base")
CPU = torch.device("cpu")

# experiment -> (parent, differences from it, LoRA setting in parameter-counts.json)
ALL_RANK_8 = "to_q,to_k,to_v,to_out.0 rank 8"
RANKS_BY_DEPTH = {"lora.rank": 16, "lora.rank_last": 4}
CELEBAHQ = {
    "celebahq-eps1": ("celebahq", {"privacy.eps": 1.0}, ALL_RANK_8),
    "celebahq-eps5": ("celebahq", {"privacy.eps": 5.0}, ALL_RANK_8),
    "celebahq-eps10": ("celebahq", {"privacy.eps": 10.0}, ALL_RANK_8),
    "celebahq-eps10-c-small": ("celebahq-eps10", {"privacy.max_grad_norm": 2.5e-4}, ALL_RANK_8),
    "celebahq-eps10-c-big": ("celebahq-eps10", {"privacy.max_grad_norm": 1e-3}, ALL_RANK_8),
    "celebahq-eps10-batch-4": ("celebahq-eps10", {"compute.physical_batch_size": 4}, ALL_RANK_8),
    "celebahq-eps10-batch-16": ("celebahq-eps10", {"compute.physical_batch_size": 16}, ALL_RANK_8),
    "celebahq-eps10-batch-32": ("celebahq-eps10", {"compute.physical_batch_size": 32}, ALL_RANK_8),
    "celebahq-eps10-k1": ("celebahq-eps10", {"privacy.k": 1}, ALL_RANK_8),
    "celebahq-eps10-k4": ("celebahq-eps10", {"privacy.k": 4}, ALL_RANK_8),
    "celebahq-eps10-k8": ("celebahq-eps10", {"privacy.k": 8}, ALL_RANK_8),
    "celebahq-eps10-r16": ("celebahq-eps10", {"lora.rank": 16}, "to_q,to_k,to_v,to_out.0 rank 16"),
    "celebahq-eps10-r32": ("celebahq-eps10", {"lora.rank": 32}, "to_q,to_k,to_v,to_out.0 rank 32"),
    "celebahq-eps10-qkvonly": ("celebahq-eps10", {"lora.targets": "to_q,to_k,to_v"}, "to_q,to_k,to_v rank 8"),
    "celebahq-eps10-projonly": ("celebahq-eps10", {"lora.targets": "to_out.0"}, "to_out.0 rank 8"),
    "celebahq-eps10-linear-rank": (
        "celebahq-eps10",
        {**RANKS_BY_DEPTH, "lora.rank_schedule": "linear"},
        "layer-wise linear 16 to 4",
    ),
    "celebahq-eps10-cosine-rank": (
        "celebahq-eps10",
        {**RANKS_BY_DEPTH, "lora.rank_schedule": "cosine"},
        "layer-wise cosine 16 to 4",
    ),
    "celebahq-no-dp-baseline": ("celebahq", {"privacy.eps": float("inf")}, ALL_RANK_8),
    "celebahq-eps10-effective-targets": ("celebahq-eps10", {"lora.targets": "default"}, None),
}
MNIST = {
    "mnist32-class-dp-eps10": ("emnist32-conditional", None, ALL_RANK_8),
    "mnist32-class-dp-eps5": ("mnist32-class-dp-eps10", {"privacy.eps": 5.0}, ALL_RANK_8),
    "mnist32-class-dp-eps1": ("mnist32-class-dp-eps10", {"privacy.eps": 1.0}, ALL_RANK_8),
}
PRETRAINING = ("autoencoder_kl_emnist32_4x4x3", "emnist32-conditional")
PRIVATE = CELEBAHQ | MNIST

# the same structure at small width: 32 pixels, latents of 4 x 4, and one step in which everybody takes part
SMALL = (
    "public.size=32 data.size=32 data.n_public=6 public.n=6 privacy.batch_size=6 privacy.epochs=1 train.grid_every=0 "
    "autoencoder.block_out_channels=[4,4,4,8] autoencoder.layers_per_block=1 autoencoder.norm_num_groups=4 "
    "ldm.norm_num_groups=4 compute.device=cpu"
)
SMALL_OF = {
    "celebahq": f"{SMALL} public.classes=[A,B,C] autoencoder.num_vq_embeddings=16 ldm.block_out_channels=[8,8,16] "
    "ldm.layers_per_block=1 ldm.attention_head_width=4 ldm.cross_attention_dim=6",
    "mnist32": f"{SMALL} public.classes=[A,B,C] ldm.block_out_channels=[8,16] ldm.attention_head_width=4",
}


# one experiment per family of epsilons, schedule of ranks and kind of targets; the others run in `make test-slow`
FAST_STEPS = (
    "celebahq-eps10",
    "celebahq-no-dp-baseline",
    "mnist32-class-dp-eps10",
)

resolved = functools.cache(load)


def test_the_experiments_are_the_study_s_and_one_of_ours():
    names = set(config_names())
    assert {name for name in names if name.startswith("celebahq-")} == set(CELEBAHQ)
    assert len(CELEBAHQ) == 18 + 1
    assert set(MNIST) | set(PRETRAINING) == {name for name in names if "mnist32" in name}
    assert len(MNIST) + len(PRETRAINING) == 5


@pytest.mark.parametrize("name", [name for name, (_, differs, _) in PRIVATE.items() if differs])
def test_each_differs_from_its_parent_in_the_one_thing_it_is_named_after(name):
    parent, differs, _ = PRIVATE[name]
    written = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    assert written.pop("extends") == parent
    assert written.pop("experiment").keys() == {"description"}
    keys = {f"{section}.{key}" for section, leaves in written.items() for key in leaves}
    assert keys == set(differs)
    ours, theirs = flatten(resolved(name)), flatten(resolved(parent))
    for key, value in ours.items():
        if key in differs:
            assert value == differs[key], key
        elif not key.startswith("experiment."):
            assert value == theirs[key], key


def test_the_values_that_all_celebahq_experiments_share_are_the_study_s():
    config = resolved("celebahq")
    assert (config.privacy.k, config.privacy.delta, config.privacy.max_grad_norm) == (2, 1e-5, 5e-4)
    assert (config.privacy.batch_size, config.privacy.epochs, config.data.n_public) == (2048, 10.0, 28000)
    assert config.train.lr == config.train.embedding_lr == pytest.approx(1e-6 * 2048)
    assert (config.train.lr_schedule, config.train.ema_decay, config.train.weight_decay) == ("constant", 0.0, 0.01)
    assert (config.train.timestep_min, config.train.timestep_max) == (0, 1000)
    assert (config.train.embedding_start, config.train.embedding_noise) == ("zero", 1.0)
    assert (config.lora.rank, config.lora.targets, config.lora.train, config.lora.alpha) == (8, "study", "AB", None)
    assert (config.sampling.n, config.sampling.steps, config.sampling.eta) == (10000, 200, 1.0)
    assert (config.sampling.guidance_scale, config.compute.device) == (1, "cuda")
    assert config.compute.physical_batch_size is None
    assert (config.ldm.beta_schedule, config.ldm.beta_start, config.ldm.beta_end) == ("linear", 0.0015, 0.0195)
    assert (config.ldm.prediction_type, config.model.base) == ("epsilon", "outputs/cin256/base")


def test_the_values_of_the_mnist_experiments_are_the_study_s():
    config = resolved("mnist32-class-dp-eps10")
    assert (config.privacy.k, config.privacy.max_grad_norm, config.privacy.batch_size) == (12, 1e-3, 2000)
    assert (config.train.lr, config.train.embedding_lr, config.lora.rank) == (2e-5, 2e-5, 8)
    assert (config.ldm.attention_heads, config.ldm.beta_end) == (2, 0.0155)
    assert (config.compute.physical_batch_size, config.data.n_public) == (256, 60000)
    assert config.ldm.lr == pytest.approx(5e-6 * 512)
    assert config.autoencoder.lr == pytest.approx(4.5e-6 * 100)
    assert (config.autoencoder.disc_start, config.autoencoder.kl_weight) == (50001, 1e-6)


def test_sample_rate_and_steps_are_those_of_the_public_numbers():
    from dp_lora.privacy.accounting import steps_for

    for name, rate, steps in (("celebahq", 2048 / 28000, 137), ("mnist32-class-dp-eps10", 1 / 30, 6000)):
        config = resolved(name)
        found = config.privacy.batch_size / config.data.n_public
        assert (found, steps_for(config.privacy.epochs, found)) == (rate, steps)


def test_the_readme_tables_what_the_files_hold():
    text = (ROOT / "configs" / "README.md").read_text()
    assert set(re.findall(r"^\| `([\w.-]+)`", text, flags=re.MULTILINE)) == set(config_names())
    rows = {
        name: [cell.strip() for cell in row.split("|")]
        for name, row in re.findall(r"^\| `([\w.-]+)`[^|]*\| `[\w.-]+` \| (.*) \|$", text, flags=re.MULTILINE)
    }
    for name in PRIVATE:
        config = resolved(name)
        _, eps, rank, k, norm, *lora = rows[name]
        last = "" if config.lora.rank_last is None else f" to {config.lora.rank_last}"
        assert (float(eps), rank, int(k)) == (config.privacy.eps, f"{config.lora.rank}{last}", config.privacy.k), name
        assert norm == "none" if eps == "inf" else float(norm) == config.privacy.max_grad_norm, name
        if lora:
            setting = PRIVATE[name][2]
            effective = COUNTS["cin256"]["lora"][ALL_RANK_8]
            expected = (
                COUNTS["cin256"]["lora"][setting]["lora_parameters"]
                if setting
                else effective["lora_parameters"] - effective["of_which_attn2_to_q_to_k"]
            )
            assert lora == [f"{expected:,}"], name


def sent_by(text: str, commands: list[str], folder: Path) -> list[list[str]]:
    """The words that `mlflow` gets from commands of the README, typed after its shell function."""
    (function,) = re.findall(r"^send\(\) \{.*?^\}$", text, flags=re.MULTILINE | re.DOTALL)
    (folder / ".venv/bin").mkdir(parents=True)
    mlflow = folder / ".venv/bin/mlflow"
    mlflow.write_text('#!/bin/bash\nprintf "%s\\t" "$@"; echo\n')
    mlflow.chmod(0o755)
    script = "\n".join([function, *commands])
    done = subprocess.run(["bash", "-ec", script], cwd=folder, capture_output=True, text=True, check=True, timeout=60)
    return [line.split("\t")[:-1] for line in done.stdout.splitlines()]


def test_each_job_file_of_the_study_is_a_command_whose_config_parameters_and_backend_config_exist(tmp_path):
    text = (ROOT / "configs" / "README.md").read_text()
    found = {}
    for words in sent_by(text, re.findall(r"`(send [^`]+)`", text), tmp_path):
        assert words[:5] == ["run", ".", "-b", "slurm", "--backend-config"]
        assert (ROOT / words[5]).exists(), words
        entry, given = words[7], dict(word.split("=", 1) for word in words[9::2])
        assert given.keys() <= {*STAGES[entry].parameters}, words
        assert given.get("overrides", "") == ""
        resolved(given["config"])
        before = {"sample": ("adapter", "FINETUNE"), "fid": ("samples", "SAMPLE")}.get(entry)
        assert before is None or given[before[0]] == before[1], words
        found.setdefault(entry, set()).add(given["config"])
    of_the_study = set(PRIVATE) - {"celebahq-eps10-effective-targets"}
    assert found == {
        "finetune": of_the_study, "sample": of_the_study, "fid": of_the_study,
        "pretrain_ae": {PRETRAINING[0]}, "pretrain_ldm": {PRETRAINING[1]},
    }  # fmt: skip
    assert set(re.findall(r"`config=([\w.-]+)`", text)) - {"NAME"} <= {*config_names()}


# `test_the_readme_tables_what_the_files_hold` checks settings that share their counts with another experiment
COUNTED = {
    **{PRIVATE[name][2]: name for name in reversed(CELEBAHQ) if PRIVATE[name][2]},
    "of ours": "celebahq-eps10-effective-targets",
    "mnist": "mnist32-class-dp-eps10",
}


@pytest.mark.parametrize("name", COUNTED.values())
def test_count_params_gives_the_study_s_lora_parameters_at_real_width(name):
    model = COUNTS["cin256" if name.startswith("celebahq") else "emnist32-conditional"]
    counts = count_parameters(resolved(name), base_shapes(resolved(name), NOWHERE))
    setting = model["lora"][PRIVATE[name][2] or ALL_RANK_8]
    left_out = 0 if PRIVATE[name][2] else setting["of_which_attn2_to_q_to_k"]
    assert counts["lora"] == counts["lora_trained"] == setting["lora_parameters"] - left_out
    assert len(counts["lora_modules"]) == setting["modules"] - (32 if left_out else 0)
    if "ranks" in setting:
        assert counts["lora_ranks"] == setting["ranks"]
    rows, width = model["class_embedder_shape"]
    assert counts["class_embedding"] == len(resolved(name).data.classes) * width
    assert counts["base_class_embedding"] == rows * width
    assert counts["trainable_with_base_rows"] == setting["lora_plus_class_embedder"] - left_out
    if model is COUNTS["cin256"]:
        assert counts["unet"] == model["unet"]


@pytest.mark.parametrize("name", ["celebahq", *PRETRAINING])
def test_the_parts_of_the_base_have_the_original_s_numbers_of_parameters(name):
    model = COUNTS["cin256" if name == "celebahq" else "emnist32-conditional"]
    counts = count_parameters(resolved(name), base_shapes(resolved(name), NOWHERE))
    assert counts["first_stage"] == model["first_stage"]
    assert counts["first_stage_parts"] == model["first_stage_parts"]
    if name != "autoencoder_kl_emnist32_4x4x3":
        assert counts["unet"] == model["unet"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    """A small base model per family of experiments."""
    folder = tmp_path_factory.mktemp("bases")
    for family, name in (("celebahq", "celebahq"), ("mnist32", "mnist32-class-dp-eps10")):
        make_base(folder / family, load(name, {}, SMALL_OF[family]))
    return folder


@pytest.mark.parametrize(
    "name", [name if name in FAST_STEPS else pytest.param(name, marks=pytest.mark.slow) for name in PRIVATE]
)
def test_an_experiment_takes_a_step_at_small_width(name, bases, tmp_path):
    family = name.split("-")[0]
    config = load(name, {}, SMALL_OF[family])
    base = bases / family
    model = load_model(base)
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((6, config.autoencoder.latent_channels, 4, 4)).astype(np.float32)
    data = PrivateData(latents, np.arange(6) % len(config.data.classes), [[i] for i in range(6)])
    with open_run_folder(tmp_path / "run", config, binding(config, "d", "b", "cpu")) as run:
        assert run.plan.steps == 1
        names = {"path": "base", "digest": "b"}
        result = finetune(config, model, names, data, run, CPU, Heard(), lambda *_: None)
        assert run.ledger.counted_steps(run.plan) == 1
    statement = json.loads((result / "privacy.json").read_text())
    assert statement["k"] == config.privacy.k
    if name == "celebahq-no-dp-baseline":
        assert result.name == "not-private"
        assert "epsilon" not in statement
    else:
        assert result.name == "release"
        assert 0.95 * config.privacy.eps < statement["epsilon"] <= config.privacy.eps
        assert statement["max_grad_norm"] == config.privacy.max_grad_norm
    tuned = apply_adapter(load_model(base), result)
    noisy, t = torch.from_numpy(latents[:2]), torch.tensor([10, 900])
    context = tuned.class_embedding[:2].unsqueeze(1)
    with torch.no_grad():
        before = load_model(base).denoiser(noisy, t, context).sample
        after = tuned.denoiser(noisy, t, context).sample
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)


@pytest.mark.slow
def test_the_pretraining_experiments_take_a_step_at_small_width(tmp_path, monkeypatch):
    from dp_lora.training import autoencoder, ldm

    def stand_in(size, device):
        """Replace VGG's features by a random linear feature."""
        feature = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        return lambda a, b: torch.nn.functional.conv2d(a - b, feature).square().mean()

    monkeypatch.setattr(autoencoder, "Perceptual", stand_in)
    letters = [
        Picture(f"{i}.png", "ABC"[i % 3], "train", encode_png(np.full((32, 32, 3), 40 * i, np.uint8))) for i in range(6)
    ]
    write_dataset(tmp_path / "data", letters, {"source": "test"}, 32, 3, packed=True)
    one_step = f"{SMALL_OF['mnist32']} autoencoder.batch_size=6 autoencoder.epochs=1 ldm.batch_size=6 ldm.epochs=1"
    events = Heard()
    config = load("autoencoder_kl_emnist32_4x4x3", {}, one_step)
    autoencoder.train_autoencoder(config, tmp_path / "data", tmp_path / "work", tmp_path / "ae", events)
    assert events.values("lpips")
    config = load("emnist32-conditional", {}, one_step)
    ldm.train_ldm(config, tmp_path / "data", tmp_path / "ae", tmp_path / "work", tmp_path / "ldm", events)
    model = load_model(tmp_path / "ldm")
    assert (model.classes, model.null_row, model.class_embedding.shape[1]) == (["A", "B", "C"], None, 5)


def test_the_embedding_starts_anew_where_the_study_s_does(bases):
    from dp_lora.models.adapters import untrained_class_embedding

    model = load_model(bases / "celebahq")
    fresh = untrained_class_embedding(model, "zero", 500, 1.0, 0)
    assert abs(float(fresh.mean())) < 0.1
    assert float(fresh.std()) == pytest.approx(1.0, abs=0.05)
    moved = untrained_class_embedding(model, "mean", 500, 1.0, 0) - fresh
    torch.testing.assert_close(moved, model.class_embedding[:3].mean(0).expand(500, -1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("entry_point", ["main", "finetune", "sample", "fid"])
def test_a_machine_without_a_gpu_stops_in_one_line_and_opens_no_run(entry_point, tmp_path, monkeypatch):
    import importlib

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    command = importlib.import_module(f"dp_lora.commands.{entry_point}").main
    before = (ROOT / "params.yaml").read_bytes()
    result = CliRunner().invoke(command, ["--config", "celebahq-eps1"])
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: compute.device=cuda: PyTorch sees no GPU here")
    assert "compute.device=cpu" in line
    assert not list(tmp_path.iterdir())
    assert (ROOT / "params.yaml").read_bytes() == before


def test_a_gpu_that_is_missing_is_no_error_where_the_cpu_is_named(tmp_path, monkeypatch):
    from dp_lora.commands.sample import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    arguments = ["--config", "celebahq-eps1", "--adapter", "no/such/folder", "--overrides", "compute.device=cpu"]
    result = CliRunner().invoke(main, arguments)
    assert "adapter=no/such/folder" in result.stderr
    assert "GPU" not in result.stderr
