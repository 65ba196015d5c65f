"""Export: the exported folder loads in stock diffusers and PEFT, and draws the same images as our own sampler."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, VQModel
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file

from dp_lora.config import ROOT
from dp_lora.errors import InputError
from dp_lora.export import example, export, is_stock
from dp_lora.files import read_json
from dp_lora.models.adapters import WEIGHTS, apply_adapter
from dp_lora.models.folder import Model, load_model
from dp_lora.models.info import load_info
from dp_lora.models.resampling import ResidualUNet2DConditionModel
from dp_lora.privacy.composition import base_privacy
from dp_lora.sampling import ddim, draw_pixels
from tests.support.tiny import card_code, make_base, make_release, plan_of, tiny_config

CONFIG = tiny_config()


def normalise(base: Path, scaling: float = 1.0) -> None:
    """Give the tiny autoencoder a normalisation other than 0 and 1: a test then sees if it is left out."""
    vae = AutoencoderKL.from_pretrained(base / "vae")
    vae.register_to_config(latents_mean=[0.5, -1.0], latents_std=[2.0, 0.5], scaling_factor=scaling)
    vae.save_pretrained(base / "vae")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path, Path]:
    """The base, release and exported folder, which no test changes."""
    folder = tmp_path_factory.mktemp("made")
    make_base(folder / "base", CONFIG)
    normalise(folder / "base")
    release = make_release(folder / "base", folder / "release")
    assert export(load_model(folder / "base"), release, CONFIG.sampling, folder / "export")
    return folder / "base", release, folder / "export"


def predicted(unet: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(3, 2, 8, 8, generator=generator), torch.randn(3, 1, 6, generator=generator)
    with torch.no_grad():
        return unet(x, torch.tensor([3, 500, 980]), context).sample


def test_each_part_loads_with_from_pretrained_and_the_unet_is_stock_and_merged(made):
    base, release, folder = made
    unet, report = UNet2DConditionModel.from_pretrained(folder / "unet", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert "lora" not in " ".join(load_file(folder / "unet/diffusion_pytorch_model.safetensors"))
    expected = apply_adapter(load_model(base), release)
    difference = (predicted(unet) - predicted(expected.denoiser)).abs().max()
    assert difference < 1e-5
    assert (predicted(unet) - predicted(load_model(base).denoiser)).abs().max() > 1e-2
    vae, vae_report = AutoencoderKL.from_pretrained(folder / "vae", output_loading_info=True)
    assert not any(vae_report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert list(vae.config["latents_std"]) == [2.0, 0.5]
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    assert torch.equal(scheduler.alphas_cumprod, expected.scheduler.alphas_cumprod)
    rows = load_file(folder / "class_embedding.safetensors")["weight"]
    assert torch.equal(rows, expected.class_embedding)
    assert rows.shape == (2 + 1, 6)


def test_the_adapter_loads_in_peft_and_by_the_code_of_the_release_s_card_and_of_the_export_s(made, monkeypatch):
    base, release, folder = made
    expected = predicted(apply_adapter(load_model(base), release).denoiser)
    loaded = [PeftModel.from_pretrained(UNet2DConditionModel.from_pretrained(base / "unet"), folder / "adapter/peft")]
    for place in (release, folder):
        monkeypatch.chdir(place)
        exec(card_code(place)[-1], names := {})
        loaded.append(names["unet"])
    for unet in loaded:
        assert (predicted(unet) - expected).abs().max() < 1e-5
    assert {path.name for path in (folder / "adapter").iterdir()} == {path.name for path in release.iterdir()}


def example_of(folder: Path) -> str:
    (text,) = [code for code in card_code(folder) if code.startswith("import ")]
    return text


@pytest.mark.slow
def test_the_model_card_s_example_draws_our_image_where_our_package_cannot_be_imported(tmp_path, monkeypatch):
    cases = {
        "guided": ("sampling.steps=4 sampling.guidance_scale=3.0", 1.0),
        "noisy": ("sampling.steps=4 sampling.guidance_scale=1.0 sampling.eta=1.0", 0.25),
    }
    script = "import os, sys\nsys.modules['dp_lora'] = None\n"
    for name, (sampling, scaling) in cases.items():
        base, config = tmp_path / name / "base", tiny_config(sampling)
        make_base(base, config)
        normalise(base, scaling)
        release = make_release(base, tmp_path / name / "release")
        folder = tmp_path / name / "export"
        assert export(load_model(base), release, config.sampling, folder)
        text = example_of(folder)
        assert len(text.partition("\n\n")[2].splitlines()) <= 12  # lines below the imports
        script += f"os.chdir({str(folder)!r})\n{text}torch.save(pixels, 'pixels.pt')\n"
    folder = tmp_path / "codebook"
    assert export(with_codebook(load_model(tmp_path / "noisy/base")), release, config.sampling, folder)
    assert "VQModel" in example_of(folder)
    script += f"os.chdir({str(folder)!r})\n{example_of(folder)}torch.save((latents, pixels), 'drawn.pt')\n"
    # one process for all scripts: imports take most of its time
    command = [sys.executable, "-I", "-c", f"{script}assert sys.modules['dp_lora'] is None\n"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]

    for name, (sampling, _) in cases.items():
        generator, config = torch.Generator().manual_seed(0), tiny_config(sampling)
        monkeypatch.setattr(ddim, "next_noise", lambda _, shape, __, g=generator: torch.randn(1, *shape, generator=g))
        model = apply_adapter(load_model(tmp_path / name / "base"), tmp_path / name / "release")
        expected = draw_pixels(model, [0], [0], config.sampling, 0, torch.device("cpu"))
        drawn = torch.load(tmp_path / name / "export/pixels.pt", weights_only=True)
        assert expected.std() > 0.05
        assert (drawn - expected).abs().max() < 1e-5, name
        with Image.open(tmp_path / name / "export/sample.png") as image:
            shown = np.asarray(image.convert("L"), dtype=np.float32)
        assert np.abs(shown - (expected[0, 0].numpy() + 1) * 127.5).max() < 1

    latents, pixels = torch.load(tmp_path / "codebook/drawn.pt", weights_only=True)
    with torch.no_grad():
        decoded = VQModel.from_pretrained(tmp_path / "codebook/vae").decode(latents).sample.clamp(-1, 1)
    assert (pixels - decoded).abs().max() < 1e-5


def with_codebook(base: Model) -> Model:
    """The base with an autoencoder that quantises, as cin256 has."""
    torch.manual_seed(2)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = VQModel(1, 1, block_out_channels=(8, 8), **blocks, latent_channels=2, norm_num_groups=4, num_vq_embeddings=16,
                  scaling_factor=1.0)  # fmt: skip
    return replace(base, vae=vae.eval())


def test_a_model_without_a_null_row_is_drawn_without_guidance(made):
    base = load_model(made[0])
    plain = replace(base, class_embedding=base.class_embedding[:3], info={**base.info, "null_row": False})
    assert "chunk" in example(base, CONFIG.sampling)
    assert "chunk" not in example(plain, CONFIG.sampling)


def test_privacy_statement_and_card_travel_and_a_further_fine_tuning_adds_what_was_spent(made):
    _, release, folder = made
    statement = read_json(release / "privacy.json")
    assert read_json(folder / "privacy.json") == statement
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"**Privacy:** {statement['statement']}." in card
    assert base_privacy(load_info(folder), plan_of()) == (statement["epsilon"], statement["delta"])
    again = load_model(folder)
    assert again.classes == ["x", "y"]
    assert (
        predicted(again.denoiser) - predicted(UNet2DConditionModel.from_pretrained(folder / "unet"))
    ).abs().max() < 2e-6


def modes(folder: Path) -> set[int]:
    return {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}


def test_release_and_export_are_as_open_as_other_new_files(made, tmp_path):
    (tmp_path / "new").touch()
    new = (tmp_path / "new").stat().st_mode & 0o777
    assert (modes(made[1]), modes(made[2])) == ({new}, {new})


def test_what_is_not_private_says_so_and_no_release_is_made_from_it(made, tmp_path):
    adapter = make_release(made[0], tmp_path / "not-private", private=False)
    export(load_model(made[0]), adapter, CONFIG.sampling, tmp_path / "export")
    card = (tmp_path / "export/README.md").read_text(encoding="utf-8")
    assert "**Privacy:** trained without privacy: no bound holds; keep this adapter to yourself." in card
    assert "post-processing" not in card
    assert (modes(adapter), modes(tmp_path / "export")) == ({0o600}, {0o600})
    with pytest.raises(InputError, match="privacy_status non-private"):
        base_privacy(load_info(tmp_path / "export"), plan_of())


def with_residual_resampling(base: Model) -> Model:
    """The base with residual blocks that halve and double the side, as latent diffusion's resblock_updown does it."""
    return replace(base, denoiser=ResidualUNet2DConditionModel.from_config(base.denoiser.config).requires_grad_(False))


def test_a_unet_that_stock_diffusers_cannot_build_is_exported_as_weights_and_says_so(made, tmp_path):
    base, release, _ = made
    assert is_stock(load_model(base).denoiser)
    assert not export(with_residual_resampling(load_model(base)), release, CONFIG.sampling, tmp_path / "export")
    card = (tmp_path / "export/README.md").read_text(encoding="utf-8")
    assert "Stock diffusers cannot build this UNet" in card
    (code,) = card_code(tmp_path / "export")  # that of the adapter
    assert "from dp_lora.models.resampling import ResidualUNet2DConditionModel\n" in code
    weights = load_file(tmp_path / "export/unet/diffusion_pytorch_model.safetensors")
    assert "down_blocks.0.downsamplers.0.conv2.weight" in weights
    assert "lora" not in " ".join(weights)


def test_an_adapter_that_is_not_finite_is_refused_and_nothing_is_written(made, tmp_path):
    from safetensors.torch import save_file

    shutil.copytree(made[1], tmp_path / "release")
    path = tmp_path / "release" / WEIGHTS
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="cannot be merged"):
        export(load_model(made[0]), tmp_path / "release", CONFIG.sampling, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_the_entry_point_exports_into_its_run_s_folder_and_refuses_a_base_that_changed_since(
    made, tmp_path, monkeypatch
):
    from mlflow import MlflowClient

    from dp_lora.commands.export import main

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    shutil.copytree(made[0], tmp_path / "base")
    folders = []
    try:
        for private in (True, False):
            adapter = make_release(tmp_path / "base", tmp_path / f"adapter-{private}", private)
            result = CliRunner().invoke(main, ["--adapter", str(adapter)])
            assert result.exit_code == 0, result.stderr
            run = client.search_runs([e.experiment_id for e in client.search_experiments()])[0]
            folders.append(ROOT / run.data.tags["output"])
            assert run.data.tags["adapter"] == str(adapter)
            assert folders[-1].name == ("export" if private else "not-private")
            assert run.data.tags["privacy"] == ("private-dp" if private else "none")
            assert ("epsilon" in run.data.metrics) is private
            assert UNet2DConditionModel.from_pretrained(folders[-1] / "unet").config["sample_size"] == 8
            assert run.data.tags["output"] in result.stdout
    finally:
        for folder in folders:
            shutil.rmtree(folder.parent, ignore_errors=True)

    normalise(tmp_path / "base", scaling=0.5)
    result = CliRunner().invoke(main, ["--adapter", str(adapter)])
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert "is missing or another one; restore it" in line
