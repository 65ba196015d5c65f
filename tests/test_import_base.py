"""The entry point import_base through the real command line, and a private step and samples with the imported base."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import dp_lora.cli.finetuning
import dp_lora.cli.pipelines
import dp_lora.commands.finetune
import dp_lora.commands.import_base
from dp_lora.config import load
from dp_lora.data.latents import encode_dataset
from dp_lora.data.layout import Picture, read_dataset, write_dataset
from dp_lora.data.png import encode_png
from dp_lora.errors import InputError
from dp_lora.events import Events
from dp_lora.files import digest_file
from dp_lora.models.adapters import apply_adapter
from dp_lora.models.counting import count_parameters
from dp_lora.models.folder import load_model
from dp_lora.models.importing import import_model
from dp_lora.models.info import model_digest
from dp_lora.models.shapes import base_shapes
from dp_lora.sampling import sample
from dp_lora.training.autoencoder import train_autoencoder
from dp_lora.training.finetune import PrivateData, finetune, units_of
from dp_lora.training.run_folder import binding, open_run_folder
from tests.support.golden import GOLDEN, TINY, checkpoint, golden_config
from tests.support.tracking_store import use_store

CPU = torch.device("cpu")
DOWNLOAD = "a" * 64  # SHA-256 of the checkpoint's archive
# a private experiment on the tiny cin256: two classes, one step
PRIVATE = (
    "data.source=folder data.path=x data.classes=[female,male] data.n_public=8 data.size=64 data.channels=3 "
    "privacy.batch_size=8 privacy.epochs=1 privacy.delta=1e-2 privacy.k=2 lora.rank=2 lora.targets=study lora.train=AB "
    "train.grid_every=0 sampling.n=4 sampling.steps=2 sampling.eta=1.0 sampling.batch_size=4 compute.device=cpu"
)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project's root with its own MLflow store, and a tiny checkpoint where `prepare` puts the real one."""
    folder = tmp_path / "data" / "cin256"
    folder.mkdir(parents=True)
    put(tmp_path, checkpoint("cin256"))
    for module in (dp_lora.commands.import_base, dp_lora.cli.pipelines):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    return tmp_path


def put(project: Path, file: Path, member: str = "model.ckpt") -> None:
    """Write a checkpoint as `prepare` does, with its recorded hash."""
    folder = project / "data" / "cin256"
    shutil.copyfile(file, folder / member)
    facts = {"url": "https://x/cin.zip", "sha256": DOWNLOAD, "file": {"name": member, "sha256": digest_file(file)}}
    (folder / "source.json").write_text(json.dumps(facts))


def import_base(project: Path, *arguments: str, overrides: str = TINY["cin256"]):
    command = ["--overrides", overrides, "--out", str(project / "base"), *arguments]
    return CliRunner().invoke(dp_lora.commands.import_base.main, command)


def refused(project: Path, *arguments: str, **options: str) -> str:
    result = import_base(project, *arguments, **options)
    assert result.exit_code == 1
    line = result.stderr.strip()
    assert line.startswith("error: ")
    assert "\n" not in line
    assert not (project / "base").exists()
    assert not list(project.glob(".base*"))
    return line


def private_pictures(folder: Path, n: int = 8) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, 64, 64, 3), dtype=np.uint8)
    pictures = (
        Picture(f"{i}.png", ("female", "male")[i % 2], "train", encode_png(image)) for i, image in enumerate(images)
    )
    write_dataset(folder, pictures, {"source": "test"}, 64, 3, packed=False)


def test_from_checkpoint_to_base_to_a_private_step_to_four_pictures(project, tmp_path, monkeypatch):
    client = use_store(tmp_path, monkeypatch)
    digest = digest_file(project / "data" / "cin256" / "model.ckpt")
    result = import_base(project)
    assert result.exit_code == 0, result.output
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert run.info.status == "FINISHED"
    assert run.data.tags["output"] == str(project / "base")
    assert run.data.metrics["class_embedding_parameters"] == 12000
    tags = {tag.key: tag.value for tag in run.inputs.dataset_inputs[0].tags}
    assert (tags["digest"], tags["url"], tags["sha256"]) == (digest, "https://x/cin.zip", DOWNLOAD)

    base = load_model(project / "base")
    assert base.info["trained_on"] == {"source": "imagenet", "checkpoint": digest, "ema": False}
    assert base.info["privacy_status"] == "public"
    assert base.classes == [str(number) for number in range(1000)]
    assert (base.info["size"], base.info["channels"], base.info["null_row"]) == (64, 3, False)
    before = {name: tensor.clone() for name, tensor in base.denoiser.state_dict().items()}

    config = load("cin256", {}, f"{TINY['cin256']} {PRIVATE}")
    private_pictures(project / "pictures")
    dataset = read_dataset(project / "pictures", config.data.classes, "train")
    latents = encode_dataset(dataset, base.vae, project / "latents", CPU, 256, Events())
    assert latents.shape == (8, 4, 8, 8)
    names = {"path": "base", "digest": model_digest(project / "base")}
    bound = binding(config, dataset.digest(), names["digest"], "cpu")
    with open_run_folder(project / "run", config, bound) as opened:
        assert opened.plan.steps == 1
        data = PrivateData(latents, dataset.labels, units_of(len(dataset), None, "picture"))
        release = finetune(config, base, names, data, opened, CPU, Events(), lambda *_: None)
    assert release.name == "release"
    assert json.loads((release / "privacy.json").read_text())["steps"] == 1
    adapter = load_file(release / "pytorch_lora_weights.safetensors")
    assert len(adapter) == 2 * 128
    base.denoiser.delete_adapters("default")
    after = {name.replace(".base_layer", ""): tensor for name, tensor in base.denoiser.state_dict().items()}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)

    model = apply_adapter(load_model(project / "base"), release)
    sample(model, config, model.info["classes"], 4, project / "working", project / "samples", Events())
    with np.load(project / "samples" / "samples.npz") as archive:
        assert archive["arr_0"].shape == (4, 64, 64, 3)
        assert archive["arr_1"].tolist() == [0, 0, 1, 1]
    drawn = read_dataset(project / "samples", config.data.classes, "synthetic")
    assert drawn.images(slice(None)).shape == (4, 64, 64, 3)
    counts = count_parameters(config, base_shapes(config, project / "base"))
    assert counts["unet"] == sum(tensor.numel() for tensor in before.values())


@pytest.mark.slow
def test_a_fine_tuning_that_names_other_heads_or_another_schedule_than_its_base_is_one_line(
    project, tmp_path, monkeypatch
):
    use_store(tmp_path, monkeypatch)
    assert import_base(project).exit_code == 0
    private_pictures(project / "pictures")
    for module in (dp_lora.commands.finetune, dp_lora.cli.finetuning):
        monkeypatch.setattr(module, "private_data", lambda _: project / "pictures")
        monkeypatch.setattr(module, "RUNS", project / "runs")
    for name in ("female", "male"):
        (tmp_path / "own" / name).mkdir(parents=True)
        (tmp_path / "own" / name / "1.png").touch()
    for wrong in ("ldm.attention_heads=4", "ldm.beta_schedule=cosine"):
        own = f"data.path={tmp_path / 'own'} model.base={project / 'base'}"
        overrides = f"{TINY['cin256']} {PRIVATE} {own} {wrong}"
        result = CliRunner().invoke(dp_lora.commands.finetune.main, ["--config", "cin256", "--overrides", overrides])
        assert result.exit_code == 1
        assert wrong in (line := result.stderr.strip().splitlines()[-1])
        assert f"{project / 'base'}'s" in line
    assert not (project / "runs").exists()


def test_a_missing_or_changed_checkpoint_says_what_to_type(project, tmp_path, monkeypatch):
    use_store(tmp_path, monkeypatch)
    folder = project / "data" / "cin256"
    (folder / "model.ckpt").write_bytes(b"another")
    assert f"not the recorded {digest_file(checkpoint('cin256'))}" in refused(project)
    (folder / "source.json").write_text("{}")
    assert "no hash of model.ckpt" in refused(project)
    put(project, checkpoint("cin256"))
    (folder / "model.ckpt").unlink()
    assert f"{folder / 'model.ckpt'}: missing; " in refused(project)
    (folder / "source.json").unlink()
    line = refused(project)
    assert "cin256: missing; type `.venv/bin/mlflow run . -b native -e prepare -P config=cin256`" in line
    assert "`dvc pull " in line


@pytest.mark.slow
def test_the_config_names_the_file_and_the_hash_of_the_download_it_was_in(project, tmp_path, monkeypatch):
    use_store(tmp_path, monkeypatch)
    (project / "data/cin256/model.ckpt").unlink()
    put(project, checkpoint("cin256"), "last.ckpt")
    assert f"{project / 'data/cin256/model.ckpt'}: missing" in refused(project)
    named = f"{TINY['cin256']} checkpoint.member=last.ckpt"
    assert "not checkpoint.sha256=eeee" in refused(project, overrides=f"{named} checkpoint.sha256={'e' * 64}")
    assert import_base(project, overrides=f"{named} checkpoint.sha256={DOWNLOAD}").exit_code == 0


@pytest.mark.slow
def test_the_base_is_the_same_wherever_the_checkpoint_came_from(project, tmp_path, monkeypatch):
    use_store(tmp_path, monkeypatch)
    assert import_base(project).exit_code == 0
    first = model_digest(project / "base")
    mirror = f"{TINY['cin256']} checkpoint.url=https://mirror/cin.zip checkpoint.sha256={DOWNLOAD}"
    assert import_base(project, overrides=mirror).exit_code == 0
    assert model_digest(project / "base") == first


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ("ldm.beta_schedule=cosine", "set ldm.beta_schedule=linear ldm.beta_start=0.0015 ldm.beta_end=0.0195"),
        ("ldm.prediction_type=v_prediction", "set ldm.prediction_type=epsilon"),
        ("ldm.attention=[false,true,true]", "left over"),
        ("public.classes=[a,b]", "1000 rows, but public.classes names 2 classes"),
        ("checkpoint.folder=null checkpoint.url=null", "checkpoint.folder: null"),
        ("ldm.attention_heads=3", "ldm.attention_heads=3: must divide"),
        ("autoencoder.num_vq_embeddings=null", "autoencoder.num_vq_embeddings"),
        ("autoencoder.attention=[true]", "autoencoder.attention"),
    ],
)
def test_a_config_that_contradicts_the_checkpoint_is_one_line_and_writes_nothing(
    project, tmp_path, monkeypatch, overrides, part
):
    use_store(tmp_path, monkeypatch)
    assert part in refused(project, overrides=f"{TINY['cin256']} {overrides}")


def test_a_hostile_checkpoint_fails_the_run_in_one_line_and_nothing_of_it_runs(project, tmp_path, monkeypatch):
    client = use_store(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    put(project, GOLDEN / "hostile" / "payload-in-callbacks.ckpt")
    assert "io.open" in refused(project)
    assert not (tmp_path / "PWNED").exists()
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert [run.info.status for run in runs] == ["FAILED"]


def test_a_row_more_than_classes_is_the_null_row(tmp_path):
    config = golden_config("emnist")
    fewer = replace(config, public=replace(config.public, classes=config.public.classes[:25]))
    model = import_model(checkpoint("emnist"), fewer, "0" * 64)
    assert model.info["null_row"] is True
    assert torch.equal(model.null_row, model.class_embedding[25])
    assert model.classes == config.public.classes[:25]


def test_the_encoder_s_memory_is_bounded_whatever_the_batch_size(tmp_path, monkeypatch):
    from dp_lora.data import latents

    private_pictures(tmp_path / "pictures")
    dataset = read_dataset(tmp_path / "pictures", ["female", "male"], "train")
    vae = import_model(checkpoint("cin256"), golden_config("cin256"), "0" * 64).vae
    whole = encode_dataset(dataset, vae, tmp_path / "whole", CPU, 256, Events())
    seen = []
    encode = latents.encode
    monkeypatch.setattr(latents, "encode", lambda vae, pixels: seen.append(len(pixels)) or encode(vae, pixels))
    monkeypatch.setattr(latents, "ENCODE_VALUES", 3 * 64 * 64 * 3)
    parts = encode_dataset(dataset, vae, tmp_path / "parts", CPU, 256, Events())
    assert seen == [3, 3, 3]  # the last batch is padded
    np.testing.assert_allclose(parts, whole, atol=1e-5)


def test_an_experiment_without_private_pictures_is_not_fine_tuned():
    for stage in ("finetune", "main", "fid"):
        with pytest.raises(InputError, match=r"config=cin256: has no private pictures"):
            load("cin256", stage=stage)
    assert load("cin256", stage="import_base").data.classes == []


def test_a_vq_autoencoder_is_not_trained_by_pretrain_ae(tmp_path):
    config = golden_config("cin256", "compute.device=cpu public.classes=[female,male]")
    private_pictures(tmp_path / "pictures")
    with pytest.raises(InputError, match=r"autoencoder\.kind=vq"):
        train_autoencoder(config, tmp_path / "pictures", tmp_path / "working", tmp_path / "out", Events())
    assert not (tmp_path / "out").exists()
