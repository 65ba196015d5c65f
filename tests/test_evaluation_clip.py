"""CLIP score of samples and their public prompts, by a tiny CLIP of random weights with a vocabulary made here."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from dp_lora.config import load
from dp_lora.data.layout import Picture, read_dataset, write_dataset
from dp_lora.data.png import encode_png
from dp_lora.errors import InputError
from dp_lora.evaluation.clip import clip_score, load_clip
from dp_lora.evaluation.evaluate import _clip_measurement
from dp_lora.sampling import SPLIT
from tests.support.tiny import tiny_model
from tests.support.tiny_pipelines import _clip_tokenizer

CPU = torch.device("cpu")
PROMPTS = ["a red sun", "two trees", "the moon " * 60]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("clip")
    torch.manual_seed(3)
    tokenizer = _clip_tokenizer()
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**small, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 77}
    vision = {**small, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(place)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    place, rng = tmp_path_factory.mktemp("samples"), np.random.default_rng(0)
    pictures = [
        Picture(f"{i}.png", PROMPTS[i % 3], SPLIT, encode_png(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)))
        for i in range(7)
    ]
    write_dataset(place / "set", pictures, {}, 40, 3, packed=False)
    return read_dataset(place / "set", PROMPTS, SPLIT)


@torch.no_grad()
def cosine(model, processor, image, prompt) -> float:
    """The cosine of one picture and one prompt, from the model's two halves."""
    pixels = processor.image_processor(images=Image.fromarray(image), return_tensors="pt")
    words = processor.tokenizer([prompt], truncation=True, max_length=77, return_tensors="pt")
    seen, read = model.get_image_features(**pixels), model.get_text_features(**words)
    return float(torch.cosine_similarity(seen.pooler_output, read.pooler_output))


def test_it_is_100_times_the_mean_cosine_of_each_sample_and_its_own_prompt(folder, samples, monkeypatch):
    model, processor = load_clip(folder, "evaluation.clip=clip", CPU)
    images = samples.images(slice(None))
    each = [cosine(model, processor, images[i], PROMPTS[samples.labels[i]]) for i in range(7)]
    expected = 100 * np.mean(each)
    assert clip_score(samples, model, processor) == pytest.approx(expected, abs=1e-3)
    monkeypatch.setattr("dp_lora.evaluation.clip.BATCH_SIZE", 3)
    assert clip_score(samples, model, processor) == pytest.approx(expected, abs=1e-3)
    others = [cosine(model, processor, images[i], PROMPTS[(samples.labels[i] + 1) % 3]) for i in range(7)]
    assert abs(100 * np.mean(others) - expected) > 0.01


def test_only_samples_that_a_guarantee_covers_have_a_score_that_may_leave(folder, samples, tmp_path):
    base = tiny_model(tmp_path)
    for covered in (True, False):
        found = _clip_measurement(str(folder), samples, True, covered, base)
        assert (found.metric, found.private) == ("clip_score", not covered)


def test_samples_of_classes_have_no_prompts(folder, samples, tmp_path):
    with pytest.raises(InputError, match=r"^evaluation\.clip=.*of classes, not of prompts; set it to null$"):
        _clip_measurement(str(folder), samples, False, True, tiny_model(tmp_path))


def test_a_pickle_and_a_folder_without_a_clip_are_refused_in_one_line(folder, tmp_path):
    model = CLIPModel.from_pretrained(folder)
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=r"^evaluation\.clip=c: ") as caught:
            load_clip(place, "evaluation.clip=c", CPU)
        assert "\n" not in str(caught.value)


def test_it_is_off_unless_a_folder_is_named():
    assert load("mnist5k").evaluation.clip is None
    assert load("mnist5k").evaluation.membership is False
