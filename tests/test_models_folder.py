import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dp_lora.errors import InputError
from dp_lora.models.attention import OneTokenAttnProcessor
from dp_lora.models.folder import load_model, load_vae, module_digest, save_model
from dp_lora.models.info import load_info, model_digest
from tests.support.tiny import make_base, tiny_config


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "base"
    make_base(folder, tiny_config())
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "base")
    return tmp_path / "base"


def save_again(model, folder: Path) -> None:
    save_model(folder, model.denoiser, model.vae, model.scheduler, model.class_embedding, model.info)


def test_a_model_saved_again_is_byte_for_byte_the_same_wherever_it_lay(folder, tmp_path):
    save_again(load_model(folder), tmp_path / "elsewhere" / "copy")
    assert model_digest(tmp_path / "elsewhere" / "copy") == model_digest(folder)


def test_no_path_of_the_machine_travels_with_a_model(folder, tmp_path):
    save_again(load_model(folder), tmp_path / "copy")
    texts = [path.read_text() for path in (tmp_path / "copy").rglob("*.json")]
    assert len(texts) == 4
    assert not any(str(tmp_path) in text for text in texts)


def test_a_loaded_model_is_frozen_in_evaluation_mode_and_attends_to_one_token(folder):
    model = load_model(folder)
    for network in (model.denoiser, model.vae):
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
    attn2 = [p for name, p in model.denoiser.attn_processors.items() if ".attn2." in name]
    assert attn2
    assert all(isinstance(p, OneTokenAttnProcessor) for p in attn2)


def test_the_null_row_is_the_last_one_and_there_is_none_without_class_dropout(folder, tmp_path):
    model = load_model(folder)
    assert model.classes == ["A", "B", "C"]
    assert torch.equal(model.null_row, model.class_embedding[3])
    info = {**model.info, "null_row": False}
    plain = tmp_path / "plain"
    save_model(plain, model.denoiser, model.vae, model.scheduler, model.class_embedding[:3], info)
    assert load_model(plain).null_row is None


def test_an_embedding_with_a_row_too_few_is_refused_before_and_after_it_is_written(folder):
    model = load_model(folder)
    before = model_digest(folder)
    with pytest.raises(InputError, match=r"\(3, 6\), but \(4, 6\)"):
        save_model(folder, model.denoiser, model.vae, model.scheduler, model.class_embedding[:3], model.info)
    assert model_digest(folder) == before
    save_file({"weight": model.class_embedding[:3].contiguous()}, folder / "class_embedding.safetensors")
    with pytest.raises(InputError, match=r"class_embedding\.safetensors: has shape \(3, 6\)"):
        load_model(folder)


def break_json(folder):
    (folder / "model.json").write_text("{")


def other_format(folder):
    (folder / "model.json").write_text(json.dumps({"format": 99}))


def no_unet(folder):
    shutil.rmtree(folder / "unet")


def no_weights(folder):
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()


def cut_weights(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def other_class(folder):
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "UNet3DConditionModel"}))


def pickled_weights(folder):
    torch.save({"weight": torch.zeros(1)}, folder / "vae" / "diffusion_pytorch_model.bin")
    no_weights(folder)


@pytest.mark.parametrize(
    "damage", [break_json, other_format, no_unet, no_weights, cut_weights, other_class, pickled_weights]
)
def test_a_damaged_model_is_refused_in_one_line_that_names_the_place(folder, damage):
    damage(folder)
    with pytest.raises(InputError, match=str(folder)) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_is_not_looked_for_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.hf_hub_download", None)
    with pytest.raises(InputError, match=r"model\.json: cannot be read"):
        load_info(tmp_path / "none")
    with pytest.raises(InputError, match="no such folder"):
        load_vae(tmp_path / "none")


def test_the_digest_changes_with_a_weight_and_not_with_a_picture_beside_the_model(folder):
    before, vae = model_digest(folder), load_vae(folder)
    (folder / "samples.png").write_bytes(b"picture")
    assert model_digest(folder) == before
    network_before = module_digest(vae)
    with torch.no_grad():
        next(vae.parameters()).view(-1)[0] += 1e-6
    assert module_digest(vae) != network_before
    model = load_model(folder)
    save_model(folder, model.denoiser, vae, model.scheduler, model.class_embedding, model.info)
    assert model_digest(folder) != before


def test_the_digest_of_an_autoencoder_changes_with_its_latent_scale(folder):
    vae = load_vae(folder)
    before = module_digest(vae)
    vae.register_to_config(latents_mean=[0.5, 0.0])
    assert module_digest(vae) != before
