"""The facts of a dry run on a pipeline: public numbers, each held against the pipeline itself."""

import pytest
from torch import nn

from dp_lora.cli.finetuning import resolve
from dp_lora.cli.pipelines import to_bring
from dp_lora.config import load
from dp_lora.models.disk import disk_line
from dp_lora.models.estimate import count_flops, flops_text
from dp_lora.models.families import FAMILIES
from dp_lora.models.folder import load_model
from dp_lora.models.memory import GIB
from dp_lora.models.targets import lora_targets
from dp_lora.training.dry_run_facts import finetuning_facts
from tests.support.text2image import captions_of, text_config
from tests.support.tiny_pipelines import make_pipeline

SD = FAMILIES["StableDiffusionPipeline"]
MANY = "sampling.prompts='a|b|c|d|e|f' compute.precision=float32"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_pipeline(tmp_path_factory.mktemp("facts") / "base", "sd")


@pytest.fixture(scope="module")
def start(base):
    return resolve(text_config(f"model.base={base} {MANY}"))


@pytest.fixture(scope="module")
def facts(start):
    return finetuning_facts(start)


def rooms(base, overrides=""):
    """Bytes by name in the line `disk`."""
    line = disk_line(text_config(f"model.base={base} compute.precision=float32 {overrides}"), base, SD)
    parts = line.partition(", for ")[0].split(", ")
    return {part.rpartition(" ")[2]: float(part.partition(" ")[0]) * GIB for part in parts}


def test_what_decides_whether_it_can_work_is_said_first(facts):
    assert list(facts)[:3] == ["base", "expected epsilon", "noise ratio"]
    assert facts["base"] == ("StableDiffusionPipeline; its unet is adapted, by noise, on captions of at most 77 tokens")
    assert 9 < facts["expected epsilon"] <= 10


def test_adapted_layers_and_operations_are_those_of_the_denoiser(facts, start):
    ends = tuple(f".{target}" for target in lora_targets("default", SD))
    layers = load_model(start.base).denoiser.named_modules()
    adapted = [name for name, layer in layers if isinstance(layer, nn.Linear) and name.endswith(ends)]
    assert facts["adapted layers"] == len(adapted) > 0
    assert facts["operations a row"] == flops_text(count_flops(start.config, start.base, start.shapes).train)


def test_the_disk_is_that_of_the_base_s_files_of_latents_and_of_encoded_captions(facts, base, tmp_path):
    found = rooms(base)
    used = sum(path.stat().st_size for part in base.iterdir() if part.is_dir() for path in part.iterdir())
    assert found["base"] == pytest.approx(used, rel=0.06)
    assert found["latents"] == pytest.approx(40 * 4 * 4 * 16 * 16, rel=0.06)
    config = text_config(f"model.base={base} compute.precision=float32")
    kept = captions_of(config, load_model(base), tmp_path / "captions").tensors.values()
    each = sum(tensor[0].numel() * tensor.itemsize for tensor in kept)
    assert found["captions"] == pytest.approx(41 * each, rel=0.06)
    one = rooms(base, "data.captions=false data.prompt='a toy'")
    assert one["captions"] == pytest.approx(2 * each, rel=0.06)
    assert rooms(base, "compute.captions=each_step").keys() == {"base", "latents"}
    assert facts["disk"].endswith("GiB of captions, for 40 pictures, a caption each")


def test_the_prompts_are_the_public_ones_and_a_long_list_is_cut(facts):
    assert facts["prompts"] == "a | b | c | d, and 2 more"


def test_a_pipeline_of_classes_has_no_prompts_and_keeps_no_captions(tmp_path):
    base = make_pipeline(tmp_path / "base", "dit")
    facts = finetuning_facts(resolve(text_config(f"model.base={base}", "dit")))
    assert facts["base"] == "DiTPipeline; its transformer is adapted, by noise, on classes"
    assert "prompts" not in facts
    assert "captions" not in facts["disk"]


def test_a_plan_for_a_gpu_is_made_without_one_and_says_that_the_run_needs_it(monkeypatch):
    monkeypatch.setattr("dp_lora.cli.pipelines.driver_is_there", lambda: False)
    assert "compute.device=cuda: PyTorch sees no GPU here" in to_bring(load("celebahq-eps10"))["first"]
    assert "GPU" not in to_bring(load("celebahq-eps10", {}, "compute.device=auto")).get("first", "")
    monkeypatch.setattr("dp_lora.cli.pipelines.driver_is_there", lambda: True)
    assert "GPU" not in to_bring(load("celebahq-eps10")).get("first", "")
    monkeypatch.setattr("dp_lora.cli.pipelines.driver_is_there", lambda: False)
    assert "GPU" not in to_bring(load("celebahq-eps10"), here=False).get("first", "")  # a cluster's node does the work
