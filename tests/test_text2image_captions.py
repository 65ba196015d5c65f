"""Captions in the private step are kept or encoded anew, and dropped by a picture's own coin; prompts of a pipeline."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dp_lora.data import conditions
from dp_lora.errors import InputError
from dp_lora.models.families import CLASSES, FAMILIES
from dp_lora.models.folder import load_model
from dp_lora.models.pipeline_index import steps_and_guidance
from dp_lora.models.shapes import base_shapes
from dp_lora.privacy.randomness import ItemStreams
from dp_lora.training.conditions import CaptionRows
from dp_lora.training.resolved import check_base
from tests.support.text2image import TEXTS, captions_of, gradients_of, prepared, text_config
from tests.support.tiny import difference, total_norm
from tests.support.tiny_pipelines import SIZE, make_pipeline

CPU = torch.device("cpu")
NAMES = ("sd", "sdxl", "sana", "dit")
UNITS = [[0], [1, 2], [3, 4, 5]]
MANY = f"data.classes=[{','.join(f'c{number}' for number in range(1001))}]"
EACH_STEP = "compute.captions=each_step"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {name: make_pipeline(folder / name, name) for name in NAMES}


@pytest.mark.parametrize(("name", "precision"), [("sdxl", "float32"), ("sana", "bfloat16")])
def test_captions_that_are_encoded_in_each_step_give_the_gradients_of_kept_ones(name, precision, bases, tmp_path):
    of = prepared(bases, name, tmp_path, f"compute.precision={precision}")
    again = prepared(bases, name, tmp_path / "none", f"compute.precision={precision} {EACH_STEP}")
    for rows in (8, 2):
        kept, anew = gradients_of(*of, UNITS, rows), gradients_of(*again, UNITS, rows)
        assert max(total_norm(difference(kept[number], anew[number])) for number in kept) == 0
    assert not (tmp_path / "none").exists()  # no caption is written


def test_a_caption_that_is_encoded_in_a_step_is_encoded_alone_and_no_word_of_it_is_told(bases, tmp_path, capfd):
    model = load_model(bases["sd"])
    captions = captions_of(text_config(EACH_STEP), model, tmp_path, [["secretword " * 100], ["a dog"]])
    seen, encode = [], type(model.family).encode

    def noted(self, pipe, caption, size):
        seen.append(caption)
        return encode(self, pipe, caption, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.family), "encode", noted)
        rows = captions.rows([0, 0, 1])
    assert seen == ["secretword " * 100, "a dog"]
    assert torch.equal(rows["context"][0], rows["context"][1])
    assert torch.equal(captions.rows([1])["context"][0], rows["context"][2])
    assert "secretword" not in "".join(capfd.readouterr())


def test_an_interrupted_encoding_of_captions_goes_on_from_its_record_to_the_same_bits(bases, tmp_path, monkeypatch):
    model, texts = load_model(bases["sd"]), [[f"a {number}"] for number in range(7)]
    whole = captions_of(text_config(), model, tmp_path / "whole", texts)
    seen, encode = [], conditions._encoded

    def noted(text, *of):
        seen.append(text)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return encode(text, *of)

    monkeypatch.setattr(conditions, "_encoded", noted)
    monkeypatch.setattr(conditions, "RECORD_EVERY", 2)
    with pytest.raises(KeyboardInterrupt):
        captions_of(text_config(), model, tmp_path / "cache", texts)
    found = captions_of(text_config(), model, tmp_path / "cache", texts)
    assert seen[6:] == ["a 4", "a 5", "a 6", ""]
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in whole.tensors.items())
    (kept,) = (tmp_path / "cache").glob("*.captions")
    assert {path.stat().st_mode & 0o777 for path in kept.iterdir()} == {0o600}
    assert not list((tmp_path / "cache").glob("*.part"))


def test_an_encoder_that_is_broken_is_refused_by_a_public_caption_before_any_step(bases, tmp_path):
    model = load_model(bases["sd"])
    model.pipeline.text_encoder.get_input_embeddings().weight.data.fill_(torch.nan)
    for overrides in ("", EACH_STEP):
        with pytest.raises(InputError, match="text encoder gives NaN"):
            captions_of(text_config(overrides), model, tmp_path)


def rows_of(model, captions, dropout):
    return CaptionRows(model, SIZE, captions, dropout, CPU)


def test_the_coin_of_a_picture_s_own_stream_drops_its_caption(bases, tmp_path):
    model = load_model(bases["sd"])
    captions = captions_of(text_config(), model, tmp_path)
    rows = rows_of(model, captions, 0.25)
    stream = np.random.default_rng(0)
    chosen = [rows.choose(2, stream) for _ in range(4000)]
    assert set(chosen) == {captions.of[2][0], captions.empty}
    assert np.mean(np.array(chosen) == captions.empty) == pytest.approx(0.25, abs=0.03)
    empty = model.family.encode(model.pipeline, "", SIZE)["context"]
    assert torch.equal(captions.rows([captions.empty])["context"], empty)
    # without dropout there is no coin, so a picture's other draws do not change
    stream = np.random.default_rng(0)
    rows_of(model, captions, 0.0).choose(2, stream)
    assert stream.random() == np.random.default_rng(0).random()


def test_dropped_captions_leave_each_unit_s_gradient_its_own(bases, tmp_path):
    config, model, adapter, latents, captions = prepared(bases, "sd", tmp_path, "train.caption_dropout=0.5")
    of = (config, model, adapter, latents)
    together = gradients_of(*of, captions, UNITS, 6)
    for number, unit in enumerate(UNITS):
        alone = gradients_of(*of, captions, [unit], len(unit))[0]
        assert total_norm(difference(together[number], alone)) < 2e-5 * total_norm(alone)
    # a changed caption of one unit changes no other unit's gradient
    others = captions_of(config, model, tmp_path / "others", [["something else"], *TEXTS[1:]])
    moved = gradients_of(*of, others, UNITS, 6)
    assert max(total_norm(difference(together[number], moved[number])) for number in (1, 2)) == 0


def test_nearly_all_captions_dropped_is_training_on_the_empty_caption(bases, tmp_path):
    nearly = "train.caption_dropout=0.999999"
    config, model, adapter, latents, captions = prepared(bases, "sd", tmp_path, nearly)
    dropped = gradients_of(config, model, adapter, latents, captions, UNITS, 6)
    empty = captions_of(config, model, tmp_path / "empty", [[""]] * 6)
    expected = gradients_of(config, model, adapter, latents, empty, UNITS, 6)
    assert max(total_norm(difference(dropped[number], expected[number])) for number in dropped) == 0
    assert ItemStreams(3)[0].random() < 0.999999


@pytest.mark.parametrize(
    ("pipeline", "own"),
    [("StableDiffusionPipeline", (50, 7.5)), ("FluxPipeline", (28, 3.5)), ("SanaPipeline", (20, 4.5)),
     ("DiTPipeline", (50, 4.0))],
)  # fmt: skip
def test_null_steps_and_guidance_are_the_pipeline_s_own(pipeline, own):
    sampling = text_config("sampling.steps=null sampling.guidance_scale=null").sampling
    assert steps_and_guidance(sampling, FAMILIES[pipeline]) == own
    assert steps_and_guidance(replace(sampling, steps=3), FAMILIES[pipeline]) == (3, own[1])
    with pytest.raises(InputError, match=r"sampling\.steps=null: this base is no pipeline"):
        steps_and_guidance(sampling, CLASSES)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [("train.caption_dropout=0.1", "train.caption_dropout: must be 0"),
     ("data.size=64", "the base is for pictures of 32 pixels"),
     (MANY, "has rows for 1,000 classes"),
     ("data.classes=[] data.captions=true", "this base learns classes, not captions"),
     ("data.prompts=[a,b,c]", "data.prompts: must be null: this base learns the names in data.classes"),
     ("data.prompt=toy", "data.prompt: must be null"),
     ("train.embedding_start=7,dog,9", "'dog' is no class of the base")],
)  # fmt: skip
def test_what_a_class_conditional_pipeline_cannot_learn_is_refused_in_one_line(bases, overrides, line):
    base = bases["dit"]
    config = text_config(f"{overrides} model.base={base}", "dit")
    start = SimpleNamespace(config=config, base=base, shapes=base_shapes(config, base), spent_by_base=lambda: ())
    with pytest.raises(InputError, match=line):
        check_base(start)
