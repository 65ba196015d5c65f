"""Pipelines as bases: per-unit gradients, separate rows, dead targets, checkpointing, releases that load elsewhere."""

import functools
import json
import logging
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DiffusionPipeline, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from dp_lora.config import ROOT
from dp_lora.data import conditions
from dp_lora.diffusion import Flow
from dp_lora.errors import InputError
from dp_lora.export import export
from dp_lora.models import folder
from dp_lora.models.adapters import WEIGHTS, apply_adapter, ready_to_draw, use_checkpointing
from dp_lora.models.families import Family
from dp_lora.models.folder import load_model
from dp_lora.privacy.gradients import micro_batches, part_gradients
from dp_lora.privacy.randomness import ItemStreams
from dp_lora.release import write_result
from dp_lora.sampling import draw_pixels
from dp_lora.sampling.noise import image_stream, next_noise
from dp_lora.sampling.text import draw_prompts
from dp_lora.statement import read_privacy
from dp_lora.training import costs, measure
from dp_lora.training.finetune import make_adapter
from dp_lora.training.private_loss import diffusion_loss
from dp_lora.training.private_run import named_base
from tests.support.text2image import (
    CPU,
    TEXTS,
    captions_of,
    fine_tuned,
    gradients_of,
    plain_gradient,
    prepared,
    text_config,
)
from tests.support.tiny import card_code, difference, plan_of, total_norm
from tests.support.tiny_pipelines import BUILD, SIZE, TEXT, make_pipeline


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {name: make_pipeline(folder / name, name) for name in BUILD}


@pytest.mark.parametrize("name", list(BUILD))
def test_each_unit_s_gradient_is_plain_autograd_s_of_its_rows_with_and_without_checkpointing(name, bases, tmp_path):
    units = [[0], [1, 2], [3, 4, 5]]
    of = prepared(bases, name, tmp_path)
    together = gradients_of(*of, units, 6)
    for number, unit in enumerate(units):
        plain = plain_gradient(*of, unit)
        assert all(gradient.any() for gradient in plain.values())
        assert total_norm(difference(together[number], plain)) < 2e-5 * total_norm(plain)
    use_checkpointing(of[1].denoiser)
    again = gradients_of(*of, units, 6)
    for number in range(len(units)):
        assert total_norm(difference(again[number], together[number])) < 1e-6 * total_norm(together[number])


def drawn(model, config):
    """Two images (2, 3, H, W) in [0, 1] of the first two prompts or classes."""
    of = draw_pixels if model.family.of_classes else draw_prompts
    return (of(of_config(model, config), [0, 1], [0, 0], config.sampling, 3, CPU) + 1) / 2


def of_config(model, config):
    return ready_to_draw(replace(model, info={**model.info, "classes": list(config.data.classes)}), config)


def first_noise(model, config):
    """The noise that the pipeline gets for the images of `drawn`."""
    if model.family.of_classes:
        streams = [image_stream(3, name, 0) for name in config.data.classes[:2]]
        return {"latents": next_noise(streams, model.latent_shape(SIZE), CPU)}
    seen = {}

    def kept(_pipe, *, latents, generator, **_):
        seen["latents"], seen["seeds"] = latents, [one.initial_seed() for one in generator]
        return SimpleNamespace(images=torch.zeros(2, 3, SIZE, SIZE))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.pipeline), "__call__", kept)
        drawn(model, config)
    return seen


FAST = ("sd", "dit")  # one per way to load; tests of the others are slow
FAMILIES = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in BUILD]
CHECKPOINTED = {"sd": "compute.checkpointing=always", "pixart": "compute.checkpointing=always"}


@pytest.fixture(scope="module")
def release_of(bases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("releases")
    return functools.cache(lambda name: fine_tuned(folder / name, bases[name], CHECKPOINTED.get(name, "")))


STOCK = """
import json, os, sys
import torch, diffusers
from diffusers.pipelines.dit import pipeline_dit
diffusers.utils.logging.disable_progress_bar()
for release, code, call, io in json.load(open(sys.argv[1])):
    os.chdir(release)
    card = {}
    exec(code, card)
    pipe = card["pipe"]
    pipe.set_progress_bar_config(disable=True)
    given = torch.load(io, weights_only=True)
    if isinstance(pipe, diffusers.DiTPipeline):
        pipeline_dit.randn_tensor = lambda *_, **__: given["latents"]  # it takes none from its caller
        call = {"class_labels": [0, 1]}
    else:
        generators = [torch.Generator().manual_seed(seed) for seed in given["seeds"]]
        call |= {"prompt": ["a sun", "a tree"], "latents": given["latents"], "generator": generators}
        call |= {"height": 32, "width": 32}
    images = pipe(num_inference_steps=2, guidance_scale=2.0, output_type="pt", **call).images
    print(float((images - given["images"]).abs().max()), float((images - given["of_base"]).abs().max()))
"""


@pytest.mark.parametrize(
    "names", [FAST, pytest.param(tuple(name for name in BUILD if name not in FAST), marks=pytest.mark.slow)]
)
def test_every_card_s_code_draws_the_same_in_a_stock_pipeline_of_a_fresh_process(names, bases, release_of, tmp_path):
    wanted = []
    for name in names:
        config, base = text_config(name=name), bases[name]
        of_base, ours = load_model(base), apply_adapter(load_model(base), release_of(name))
        io = tmp_path / f"{name}.pt"
        facts = {"images": drawn(ours, config), "of_base": drawn(of_base, config)}
        torch.save({**first_noise(of_base, config), **facts}, io)
        (code,) = card_code(release_of(name))
        row = [release_of(name), code, dict(ours.family.call), io]
        wanted.append([str(value) if isinstance(value, Path) else value for value in row])
    (tmp_path / "wanted.json").write_text(json.dumps(wanted))
    done = subprocess.run(
        [sys.executable, "-c", STOCK, tmp_path / "wanted.json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [tuple(map(float, line.split())) for line in done.stdout.splitlines()]
    for name, (to_ours, to_base) in zip(names, found, strict=True):
        assert to_ours < 1e-6, name
        assert to_base > 1e-4, name  # the adapter does something


def test_a_stock_pipeline_loads_two_adapters_and_is_the_base_again_once_they_are_unloaded(bases, release_of):
    pipe = DiffusionPipeline.from_pretrained(bases["sd"])
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    given = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, 7, 32)

    @torch.no_grad()
    def output():
        return pipe.unet(*given).sample

    of_base = output()
    for name in ("one", "two"):
        pipe.load_lora_weights(release_of("sd"), adapter_name=name)
    outputs = []
    for chosen in (["one"], ["one", "two"]):
        pipe.set_adapters(chosen)
        outputs.append(output())
    assert all((found - of_base).abs().max() > 1e-4 for found in outputs)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-4
    pipe.unload_lora_weights()
    assert torch.equal(output(), of_base)
    after = pipe.unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_a_release_states_what_it_cost_and_holds_no_caption(release_of):
    for name in FAST:
        release = release_of(name)
        statement = read_privacy(release)
        assert statement["private"] is True
        assert 0 < statement["epsilon"] <= 10
        assert (release / "class_embedding.safetensors").exists() is (name == "dit")
        text = "".join(path.read_text() for path in release.rglob("*") if path.suffix in (".md", ".json"))
        assert not [word for words in TEXTS for word in words if len(word) > 1 and word in text], name
        assert (release / WEIGHTS).exists() is (name != "dit")


def test_the_last_block_s_context_queries_of_sd3_are_left_untrained(bases, tmp_path):
    _, _, adapter, _, _ = prepared(bases, "sd3", tmp_path)
    assert adapter.dead == {f"transformer_blocks.1.attn.add_q_proj.lora_{factor}" for factor in "AB"}
    assert not adapter.dead & set(adapter.parameters("AB"))
    assert prepared(bases, "sd", tmp_path)[2].dead == frozenset()


def test_a_base_whose_rows_are_not_apart_is_refused(bases, monkeypatch):
    config, model = text_config(), load_model(bases["sd"])
    model = replace(model, info={**model.info, "size": SIZE})
    real = Family.predict

    def mixed(self, denoiser, x_t, t, conditions):
        return real(self, denoiser, x_t, t, conditions) + 1e-2 * x_t.mean()

    monkeypatch.setattr(Family, "predict", mixed)
    with pytest.raises(InputError, match="changes with another row"):
        make_adapter(config, model, CPU)


@pytest.mark.parametrize(
    ("name", "scheduler", "line"),
    [("sd", DDIMScheduler(prediction_type="sample"), "its DDIMScheduler predicts sample; bases that predict"),
     ("sdxl", EDMEulerScheduler(), "its EDMEulerScheduler predicts EDM's target; bases"),
     ("sd", FlowMatchEulerDiscreteScheduler(), "is trained by noise here, but its FlowMatchEuler"),
     ("sd3", DDIMScheduler(), "is trained by flow matching here, but its DDIMScheduler is of another process")],
)  # fmt: skip
def test_a_pipeline_with_a_scheduler_of_another_process_is_refused_in_one_line(name, scheduler, line, bases):
    model = replace(load_model(bases[name]), scheduler=scheduler, info={"size": SIZE})
    with pytest.raises(InputError, match=f"^model.base: .*{line}"):
        make_adapter(text_config(), model, CPU)


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_a_pipeline_with_a_nan_among_its_weights_is_refused_by_name(name, bases):
    config, model = text_config("model.base=/bases/broken", name), load_model(bases[name])
    list(model.denoiser.parameters())[-1].data[0] = torch.nan
    with pytest.raises(InputError, match=r"model\.base=/bases/broken: its weights hold NaN or infinity \("):
        make_adapter(config, replace(model, info={**model.info, "size": SIZE}), CPU)


def test_a_caption_that_is_too_long_is_cut_without_a_word_of_it_on_the_terminal(bases, tmp_path, capfd, monkeypatch):
    model = load_model(bases["sd"])

    def said(folder):
        capfd.readouterr()
        logs = [logging.getLogger(name) for name in ("diffusers", "transformers")]
        # the libraries' own handlers keep the terminal that they found at import
        handler = logging.StreamHandler(sys.stderr)
        for log in logs:
            log.addHandler(handler)
        try:
            captions_of(text_config(), model, folder, [["secretword " * 100]])
        finally:
            for log in logs:
                log.removeHandler(handler)
        return "".join(capfd.readouterr())

    assert "secretword" not in said(tmp_path / "quiet")
    monkeypatch.setattr(conditions, "quiet_libraries", nullcontext)
    assert "secretword" in said(tmp_path / "loud")  # so the line above can fail


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_loading_a_pipeline_writes_nothing_on_the_terminal(bases, name):
    # a new process, because the libraries' handlers keep the terminal that they found at import
    script = "import sys, pathlib; from dp_lora.models.folder import load_model; load_model(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", script, str(bases[name])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_captions_are_encoded_once_alone_and_kept_for_their_owner(bases, tmp_path, monkeypatch):
    model = load_model(bases["sd"])
    first = captions_of(text_config(), model, tmp_path / "captions")
    # the six pictures have five different captions; the sixth is the empty one
    assert {len(tensor) for tensor in first.tensors.values()} == {6}
    assert first.of[0] == first.of[3]
    alone = captions_of(text_config(), model, tmp_path / "one", [TEXTS[5]])
    assert torch.equal(alone.tensors["context"][0], first.tensors["context"][first.of[5][0]])
    monkeypatch.setattr(Family, "encode", None)
    again = captions_of(text_config(), model, tmp_path / "captions")
    assert torch.equal(again.tensors["context"], first.tensors["context"])
    kept = [path for path in (tmp_path / "captions").rglob("*") if path.suffix == ".npy"]
    assert {path.stat().st_mode & 0o777 for path in kept} == {0o600}
    assert {path.parent.stat().st_mode & 0o777 for path in kept} == {0o700}


def test_rows_of_nobody_have_the_shapes_of_captions(bases):
    for name in TEXT:
        model = load_model(bases[name])
        encoded = model.family.encode(model.pipeline, "a red apple", SIZE)
        blank = model.family.blank(model.denoiser.config, SIZE)
        assert {key: tensor.shape for key, tensor in encoded.items()} == {k: t.shape for k, t in blank.items()}, name


def test_of_several_captions_a_picture_s_own_stream_draws_one_however_rows_are_cut(bases, tmp_path):
    config, model, adapter, latents, _ = prepared(bases, "sd", tmp_path)
    captions = captions_of(config, model, tmp_path / "several", [[*texts, "other"] for texts in TEXTS])
    parts = []
    for rows in (8, 2):
        loss = diffusion_loss(config, model, latents, np.zeros(6, np.int64), CPU, captions)(ItemStreams(3))
        total = dict.fromkeys(adapter.parameters("AB"), 0)
        for batch in micro_batches([[0], [1]], 4, rows, CPU):
            for name, gradient in part_gradients(loss, adapter.parameters("AB"), batch)[0].items():
                total[name] = total[name] + gradient.double().sum(0)
        parts.append(total)
    assert total_norm(difference(*parts)) < 1e-5 * total_norm(parts[0])


def test_times_of_a_flow_follow_their_law():
    for shift in (1.0, 3.0):
        stream = np.random.default_rng(0)
        drawn = np.array([Flow(shift).time(stream, 0, 1000) for _ in range(20_000)])
        # the logit-normal's median is 1/2; the shift maps it to shift / (1 + shift)
        assert np.median(drawn) == pytest.approx(shift / (1 + shift), abs=0.01)
        u = drawn / (shift - (shift - 1) * drawn)
        logit = np.log(u / (1 - u))
        assert logit.mean() == pytest.approx(0, abs=0.03)
        assert logit.std() == pytest.approx(1, abs=0.03)
    narrow = [Flow(3.0).time(np.random.default_rng(i), 300, 900) for i in range(50)]
    assert 0.3 < min(narrow) < max(narrow) < 0.9


@pytest.mark.parametrize(
    ("change", "line"),
    [({"_class_name": "StableDiffusionInpaintPipeline"}, "pipeline class StableDiffusionInpaintPipeline: must be one"),
     ({"_class_name": ["pipeline", "Mine"]}, "must be one of"),
     ({"unet": ["my_unet", "Mine"]}, "unet: brings code of its own")],
)  # fmt: skip
def test_a_pipeline_of_another_class_or_with_code_of_its_own_is_refused_in_one_line(bases, tmp_path, change, line):
    folder = tmp_path / "base"
    shutil.copytree(bases["sd"], folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | change))
    with pytest.raises(InputError, match=re.escape(line)):
        load_model(folder)


def test_pickled_and_quantised_weights_are_refused(bases, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(bases["sd"], folder)
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(InputError, match="cannot be read"):
        load_model(folder)
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(InputError, match="quantised"):
        load_model(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_export_is_a_stock_pipeline_that_draws_the_same_and_states_what_was_spent(
    name, bases, release_of, tmp_path, monkeypatch
):
    config, folder = text_config(name=name), tmp_path / name
    expected = drawn(apply_adapter(load_model(bases[name]), release_of(name)), config)
    assert export(load_model(bases[name]), release_of(name), config.sampling, folder)
    merged = load_model(folder)
    torch.testing.assert_close(drawn(merged, config), expected, atol=1e-4, rtol=0)
    assert (drawn(load_model(bases[name]), config) - expected).abs().max() > 1e-3  # the adapter does something
    assert merged.info["privacy_status"] == "private-dp"
    assert merged.info["privacy"]["epsilon"] == read_privacy(release_of(name))["epsilon"]
    monkeypatch.chdir(folder)
    for code, adapted in zip(card_code(folder), (False, True), strict=True):
        exec(code, names := {})
        part = getattr(names["pipe"], merged.family.part)
        assert any("lora" in key for key in part.state_dict()) is adapted


def test_a_release_names_its_base_on_the_hub_in_a_card_that_loads_it_from_there(bases, tmp_path):
    revision = "a" * 40
    config = text_config(f"model.base=owner/name model.revision={revision}")
    names = named_base(SimpleNamespace(config=config, base_name="data/owner--name-0", base=bases["sd"]))
    adapter = make_adapter(config, replace(load_model(bases["sd"]), info={"size": SIZE}), CPU)
    write_result(tmp_path / "release", plan_of(target_epsilon=8.0), 10, "0" * 32, "0" * 64, config, adapter, (), names)
    head = (tmp_path / "release/README.md").read_text().split("---")[1]
    assert yaml.safe_load(head)["base_model"] == "owner/name"
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            DiffusionPipeline, "from_pretrained", lambda *of, **named: seen.append((of, named)) or MagicMock()
        )
        exec(card_code(tmp_path / "release")[0], {})
    assert seen == [(("owner/name",), {"revision": revision})]


def test_what_a_pipeline_takes_is_measured_on_dummies_where_a_dry_run_has_a_gpu(bases, monkeypatch):
    monkeypatch.setattr(measure, "STEPS", 1)
    monkeypatch.setattr(measure, "IMAGES", 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(costs, "driver_is_there", lambda: True)
    measured, loaded = measure.measure_rates, load_model
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(folder, "load_model", lambda base, *_: loaded(base))
    monkeypatch.setattr(measure, "measure_rates", lambda config, model, rows, _: measured(config, model, rows, CPU))
    rates = costs.rates_at_hand(text_config("compute.device=auto"), bases["sd"])
    assert min(rates.row, rates.image, rates.encode) > 0
