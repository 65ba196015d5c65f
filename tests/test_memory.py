"""The memory of a row of the private step, counted on the real structure of published bases; no downloads."""

import functools
from dataclasses import replace

import pytest
import torch

from dp_lora.config import load
from dp_lora.models.memory import GIB, GPU_BYTES, USABLE, memory_line
from dp_lora.models.shapes import base_shapes
from tests.support import real_base
from tests.support.real_base import REAL, counted_row
from tests.support.text2image import text_config
from tests.support.tiny_pipelines import make_pipeline

QUICK = ("FLUX.1-dev 512",)  # tests of the others are slow
LORA = replace(load("mnist5k").lora, rank=4, train="AB")
T5_XXL, CLIP_L, VAE = 4_762_310_656, 123_060_480, 83_819_683  # numbers of FLUX's other parts


@functools.cache
def counted(name):
    return counted_row(REAL[name], LORA), REAL[name]["gib"]


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in REAL])
def test_a_row_at_real_width_holds_what_was_tabled(name):
    found, tabled = counted(name)
    assert found.weights / GIB == pytest.approx(tabled["weights"], rel=0.03)
    assert found.kept / GIB == pytest.approx(tabled["row"], rel=0.03)
    assert found.checkpointed / GIB == pytest.approx(tabled["checkpointed"], rel=0.05)


def test_flux_at_512_pixels_fits_on_one_gpu_of_80_gb_with_checkpointing():
    found, _ = counted("FLUX.1-dev 512")
    frozen = found.weights + 2 * (T5_XXL + CLIP_L) + 4 * VAE
    rows = (USABLE * GPU_BYTES - frozen) / found.checkpointed
    assert 40 < rows < 80
    # in float32 not even its denoiser and its text encoders fit
    assert 2 * found.weights + 4 * T5_XXL > 0.8 * GPU_BYTES


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_a_dry_run_says_what_a_row_holds_and_how_many_fit(name, tmp_path):
    base = make_pipeline(tmp_path / "base", name)
    config = text_config(f"model.base={base}", name)
    line = memory_line(config, base, base_shapes(config, base))
    assert line.startswith("0.00")
    assert "GiB a row (" in line
    assert " without checkpointing): about " in line
    assert line.endswith("rows at a time on a GPU of 80 GB; counted in bfloat16, not measured")
    never = replace(config, compute=replace(config.compute, checkpointing="never", precision="float32"))
    other = memory_line(never, base, base_shapes(never, base))
    assert " with checkpointing): about " in other
    assert other.endswith("counted in float32, not measured")


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["never", "always"])
def test_a_row_of_the_private_step_is_measured_by_the_difference_of_two_batches(checkpointing):
    # `make test-gpu` measures this at real width; here a CPU also keeps the scores of attention, which do not count
    case = {**real_base.REAL["SD1.5 512"], "size": 64, "latent": [4, 8, 8]}
    case["denoiser"] = {**case["denoiser"], "block_out_channels": [32, 32, 64, 64], "sample_size": 8}
    config = replace(real_base.real_config(case, checkpointing), compute=replace(text_config().compute, device="cpu"))
    counted = real_base.counted_row(case, config.lora)
    model = real_base.real_model(case, torch.device("cpu"))
    measured, milliseconds, rows = real_base.measured_row(config, model, torch.device("cpu"), checkpointing, 4)
    assert 0.5 < measured / (counted.kept if checkpointing == "never" else counted.checkpointed) < 3
    assert milliseconds > 0
    assert rows == 4
