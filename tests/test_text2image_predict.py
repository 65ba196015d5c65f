"""The forward pass of private training is the one that the stock pipeline makes when it draws, family by family."""

import inspect
from dataclasses import dataclass
from functools import cache, partial, wraps

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline

from dp_lora.diffusion import Flow, process_of
from dp_lora.models.families import flux, sdxl
from dp_lora.models.folder import load_model
from tests.support.tiny_pipelines import BUILD, SIZE, TEXT, make_pipeline

PROMPT, LABEL = "a red apple", 7
GUIDED = tuple(name for name in TEXT if name != "flux")  # FLUX is told its guidance: it makes one pass a step


@dataclass(frozen=True)
class Pass:
    """One call of a denoiser: its tensors by name, and what the pipeline's scheduler then got."""

    given: dict[str, torch.Tensor]
    output: torch.Tensor


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {name: make_pipeline(folder / name, name) for name in BUILD}


@pytest.fixture(scope="module")
def stock(bases):
    return cache(lambda name: drawn_by_the_stock_pipeline(bases[name], 1.0))


def noted(denoiser, notes):
    """Append each call's tensors to `notes`, by the names that the denoiser's forward gives them."""
    names = inspect.signature(denoiser.forward)

    def note(_, args, kwargs):
        given = names.bind(*args, **kwargs).arguments
        flat = given | (given.get("added_cond_kwargs") or {})
        notes.append({name: value.clone() for name, value in flat.items() if isinstance(value, torch.Tensor)})

    return denoiser.register_forward_pre_hook(note, with_kwargs=True)


def drawn_by_the_stock_pipeline(base, guidance):
    """Family, times (steps,) and passes of a pipeline that diffusers alone loads, while it draws in two steps."""
    family, pipe, notes, outputs = load_model(base).family, DiffusionPipeline.from_pretrained(base), [], []
    pipe.set_progress_bar_config(disable=True)
    noted(getattr(pipe, family.part), notes)
    step = pipe.scheduler.step

    @wraps(step)
    def kept(output, *args, **kwargs):
        outputs.append(output.clone())
        return step(output, *args, **kwargs)

    pipe.scheduler.step = kept
    subject = {"class_labels": [LABEL]} if family.of_classes else {"prompt": PROMPT, "height": SIZE, "width": SIZE}
    generator = torch.Generator().manual_seed(3)
    pipe(
        **subject, **family.call, guidance_scale=guidance, num_inference_steps=2, output_type="pt", generator=generator
    )
    return pipe.scheduler.timesteps, [Pass(*both) for both in zip(notes, outputs, strict=True)]


def own_conditions(model):
    if model.family.of_classes:
        return {"context": model.embedded()[LABEL][None, None]}
    return model.family.encode(model.pipeline, PROMPT, SIZE)


def unpacked(tokens):
    """Latents of FLUX's tokens, by the pipeline's own code."""
    return FluxPipeline._unpack_latents(tokens, SIZE, SIZE, 2)


@torch.no_grad()
def require_the_pipeline_s_pass(base, times, passes):
    """AssertionError where `predict` gives the denoiser other inputs than the pipeline did, or returns another output.

    The times are the scheduler's and the latents' layout is undone by stock code, so that a fault of ours in either
    cannot cancel out.
    """
    model, notes = load_model(base), []
    noted(model.denoiser, notes)
    flow = isinstance(process_of(model.scheduler, "base"), Flow)
    packed = model.family.pipeline == "FluxPipeline"
    for time, expected in zip(times, passes, strict=True):
        first = expected.given.get("hidden_states", expected.given.get("sample"))
        latents = unpacked(first) if packed else first
        t = (time.float() / 1000 if flow else time.long())[None]
        output = model.predict(latents, t, own_conditions(model))
        torch.testing.assert_close(output, unpacked(expected.output) if packed else expected.output)
        given = notes.pop()
        assert given.keys() == expected.given.keys()
        for name, value in given.items():
            if name == "class_labels":
                continue  # ours are rows of the table, which no pipeline takes; the output above covers them
            of_pipeline = expected.given[name]
            if name == "timestep":
                of_pipeline = of_pipeline.expand_as(value)
            torch.testing.assert_close(value, of_pipeline, check_dtype=False, msg=lambda line, at=name: f"{at}: {line}")


@pytest.mark.parametrize("name", list(BUILD))
def test_predict_gives_the_denoiser_what_the_stock_pipeline_gives_it(name, bases, stock):
    times, passes = stock(name)
    assert len(passes) >= 2
    require_the_pipeline_s_pass(bases[name], times, passes)


def around(wrong):
    """A mutant: `predict` wrapped in `wrong(real, x_t, t, conditions)`, where `real` takes the same three."""

    def mutate(patch, family):
        real = family.predict
        patch.setattr(family, "predict", lambda self, denoiser, *rows: wrong(partial(real, self, denoiser), *rows))

    return mutate


def wrong_condition(key, change):
    return around(lambda real, x_t, t, conditions: real(x_t, t, {**conditions, key: change(conditions[key])}))


def other_squares(patch, _):
    """Channels last in a token, where FLUX has them first."""

    def pack(latents):
        rows, channels, height, width = latents.shape
        squares = latents.reshape(rows, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 3, 5, 1)
        return squares.reshape(rows, height * width // 4, 4 * channels)

    patch.setattr(flux, "pack", pack)


# positions, and so tokens, column by column
columns_first = around(lambda real, x_t, t, conditions: real(x_t.transpose(2, 3), t, conditions).transpose(2, 3))
wrong_time = around(lambda real, x_t, t, conditions: real(x_t, t / 1000, conditions))
MUTANTS = {
    "sd3, times without their factor": ("sd3", wrong_time),
    "sana, times without their factor": ("sana", wrong_time),
    "flux, other packing": ("flux", other_squares),
    "flux, other positions": ("flux", columns_first),
    "flux, other guidance": ("flux", lambda patch, _: patch.setattr(flux, "GUIDANCE", 3.5)),
    "sdxl, other sizes": ("sdxl", lambda patch, _: patch.setattr(sdxl, "_time_ids", lambda size: torch.zeros(1, 6))),
    "pixart, no mask": ("pixart", wrong_condition("mask", torch.ones_like)),
    "sana, no mask": ("sana", wrong_condition("mask", torch.ones_like)),
    "dit, another class": ("dit", wrong_condition("context", torch.neg)),
}


@pytest.mark.parametrize(("name", "mutate"), list(MUTANTS.values()), ids=list(MUTANTS))
def test_a_wrong_forward_pass_differs_from_the_pipeline_s(name, mutate, bases, stock, monkeypatch):
    mutate(monkeypatch, type(load_model(bases[name]).family))
    with pytest.raises(AssertionError):
        require_the_pipeline_s_pass(bases[name], *stock(name))


@pytest.mark.parametrize("name", GUIDED)
def test_the_empty_caption_is_what_the_pipeline_guides_away_from(name, bases):
    """The condition that train.caption_dropout trains on is the one that guidance subtracts."""
    _, passes = drawn_by_the_stock_pipeline(bases[name], 2.0)
    model, notes = load_model(bases[name]), []
    noted(model.denoiser, notes)
    empty = model.family.encode(model.pipeline, "", SIZE)
    with torch.no_grad():
        model.predict(torch.zeros(1, *model.latent_shape(SIZE)), torch.ones(1), empty)
    for key, value in notes[0].items():
        if key not in ("sample", "hidden_states", "timestep"):
            torch.testing.assert_close(value, passes[0].given[key][:1], check_dtype=False)


def test_time_ids_are_those_of_sdxl_s_own_function(bases):
    model = load_model(bases["sdxl"])
    own = model.pipeline._get_add_time_ids((SIZE, SIZE), (0, 0), (SIZE, SIZE), torch.float32, 32)
    for found in (model.family.encode(model.pipeline, PROMPT, SIZE), model.family.blank(model.denoiser.config, SIZE)):
        assert torch.equal(found["time_ids"], own)
