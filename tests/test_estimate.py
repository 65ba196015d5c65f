"""The cost of a config: the operations that the real networks do, and a time with its assumption."""

import os
import re
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

from dp_lora.cli.finetuning import resolve
from dp_lora.config import load
from dp_lora.errors import InputError
from dp_lora.files import write_json
from dp_lora.models.adapters import add_lora, lora_parameters
from dp_lora.models.estimate import (
    Processor,
    Rates,
    RowFlops,
    count_flops,
    estimate_lines,
    finetuning_work,
    flops_text,
    row_flops,
    sampling_work,
    time_text,
)
from dp_lora.models.flops import count_operations
from dp_lora.models.info import model_digest
from dp_lora.models.meta import meta_networks
from dp_lora.models.operations import FILE, read_operations
from dp_lora.models.shapes import base_shapes
from dp_lora.privacy.gradients import micro_batches, part_gradients
from dp_lora.privacy.randomness import ItemStreams
from dp_lora.training import costs, dry_run_facts
from dp_lora.training.costs import rates_at_hand
from dp_lora.training.private_loss import diffusion_loss
from tests.support.tiny import make_base, tiny_adapter, tiny_config, tiny_latents, tiny_model

NOWHERE = Path("no such base")
ROW = RowFlops(train=1000, forward=100, encode=10, decode=7)


def counted(config, base: Path) -> RowFlops:
    return count_flops(config, base, base_shapes(config, base))


def test_a_row_counts_as_many_operations_as_the_private_step_does_for_it(tmp_path):
    config, model = tiny_config("lora.train=AB"), tiny_model(tmp_path)
    parameters = tiny_adapter(model).parameters("AB")
    latents, labels = tiny_latents()
    loss = diffusion_loss(config, model, latents, labels, torch.device("cpu"))(ItemStreams(1))
    (rows,) = micro_batches([[0], [1, 2], [3]], 2, 8, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        part_gradients(loss, parameters, rows)
    by_kind = {str(kind): flops for kind, flops in counter.get_flop_counts()["Global"].items()}
    attention = "aten._scaled_dot_product_flash_attention_for_cpu"
    # the kernel's backward pass repeats one of the forward pass's two products
    again = by_kind[f"{attention}_backward"] - 2 * by_kind[attention]
    assert again == by_kind[attention] / 2
    expected = counter.get_total_flops() - again
    assert counted(config, tmp_path / "base").train * 8 == pytest.approx(expected, rel=0.002)


@pytest.mark.parametrize("train", [pytest.param("AB", marks=pytest.mark.slow), "B"])
@pytest.mark.parametrize(
    ("targets", "within"), [("default", 0.01), ("study", 0.01), ("ff.net.2", 0.05), ("time_emb_proj", 0.05)]
)
def test_operations_of_lora_are_those_of_a_network_that_has_it(targets, within, train):
    config = tiny_config(f"lora.targets={targets} lora.train={train} lora.rank=8")
    unet, vae = meta_networks(config, NOWHERE)
    row = row_flops(count_operations(unet, vae), base_shapes(config, NOWHERE), config.lora)
    add_lora(unet, config.lora, torch.Generator())
    unet.requires_grad_(False)
    for parameter in lora_parameters(unet, train).values():
        parameter.requires_grad_()
    latents, context = torch.empty(1, 2, 8, 8, device="meta"), torch.empty(1, 1, 6, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        predicted = unet(latents, torch.empty(1, dtype=torch.int64, device="meta"), context).sample
        assert row.forward == counter.get_total_flops()
        predicted.square().mean().backward()
    assert row.train == pytest.approx(counter.get_total_flops(), rel=within)


def test_a_base_that_states_its_operations_costs_what_its_networks_do(tmp_path):
    config = tiny_config()
    make_base(tmp_path / "base", config)
    built = counted(config, tmp_path / "base")
    stated = count_operations(*meta_networks(config, tmp_path / "base"))
    before = model_digest(tmp_path / "base")
    write_json(tmp_path / "base" / FILE, asdict(stated))
    assert read_operations(tmp_path / "base") == stated
    assert counted(config, tmp_path / "base") == built == counted(config, NOWHERE)
    assert model_digest(tmp_path / "base") == before  # the file is no part of the model
    (tmp_path / "base" / FILE).write_text("{}")
    with pytest.raises(InputError, match=r"operations\.json: cannot be read; delete it"):
        counted(config, tmp_path / "base")


def test_cin256_at_real_width_costs_what_was_counted_with_attention_to_one_token_left_out():
    row = counted(load("celebahq-eps10"), NOWHERE)
    # cross-attention at every position would cost 114.5 and 232.7 GFLOP
    assert 0.95 * 114.5e9 < row.forward < 114.5e9
    assert 0.95 * 232.7e9 < row.train < 232.7e9
    assert row.encode == pytest.approx(226e9, rel=0.01)
    assert row.decode == pytest.approx(472e9, rel=0.01)


def test_the_parts_of_a_fine_tuning_are_counted_from_public_numbers():
    config = tiny_config("privacy.k=3 train.grid_every=2 sampling.guidance_scale=2 sampling.steps=5")
    latents, steps, grids = finetuning_work(config, ROW, 5, 8.0)
    assert (latents.flops, latents.precision) == (40 * 10, "float32")
    assert (steps.flops, steps.amount, steps.precision) == (5 * 24 * 1000, "5 steps of 24 rows", "bfloat16")
    # grids at steps 0, 2, 4 and the last, each 4 images of 2 classes; guidance takes two rows per step
    assert grids.flops == 4 * 8 * (2 * 5 * 100 + 7)
    assert [part.flops for part in sampling_work(config, ROW)] == [4 * (2 * 5 * 100), 4 * 7]
    judged = tiny_config("sampling.guidance_scale=2 sampling.steps=5 sampling.attempts=4")
    # two more forward passes for each of the classes
    assert sampling_work(judged, ROW)[0].flops == 4 * (2 * 5 + 2 * len(judged.data.classes)) * 100
    single = replace(config, compute=replace(config.compute, precision="float32"))
    assert finetuning_work(single, ROW, 5, 8.0)[1].precision == "float32"


def test_the_time_is_that_of_a_named_gpu_at_a_stated_share_of_its_peak_and_no_measurement():
    config = load("celebahq-eps10")
    row = RowFlops(train=int(223.6e9), forward=int(110e9), encode=int(226e9), decode=int(472e9))
    lines = estimate_lines([*finetuning_work(config, row, 137, 2048.0), *sampling_work(config, row)])
    assert lines["estimated DP-SGD"] == "137 steps of 4,096 rows, 125 PFLOP, 5.3 minutes in bfloat16"
    assert lines["estimated samples"] == "10,000 images at 200 steps, 220 PFLOP, 9.3 minutes in bfloat16"
    assert lines["estimated decoding"] == "10,000 images, 4.72 PFLOP, 2.9 minutes in float32"
    exact = load("celebahq-eps10", {}, "sampling.precision=float32")
    assert estimate_lines(sampling_work(exact, row))["estimated samples"].endswith("2.3 hours in float32")
    # the goal for one H100: from latents to 10,000 samples in under 30 minutes
    assert lines["estimated total"] == "21 minutes"
    assert list(lines)[-1] == "estimated on"
    for part in ("NVIDIA H100", "40% of its peak", "989 TFLOP/s in bfloat16", "TF32 off", "computed, not measured"):
        assert part in lines["estimated on"]


@pytest.mark.parametrize(
    ("flops", "text"),
    [(0, "0 MFLOP"), (2e6, "2 MFLOP"), (6.744e12, "6.74 TFLOP"), (9.9996e14, "1 PFLOP"), (1.25e20, "125 EFLOP")],
)
def test_operations_are_written_with_three_digits(flops, text):
    assert flops_text(flops) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0171, "0.017 seconds"), (85, "85 seconds"), (318, "5.3 minutes"), (432000, "120 hours")]
)
def test_times_are_written_with_two_digits(seconds, text):
    assert time_text(seconds) == text


def test_a_dry_run_of_sample_prints_the_estimate_of_the_resolved_config():
    from dp_lora.commands.sample import main

    result = CliRunner().invoke(main, ["--dry-run", "--overrides", "sampling.n=77"])
    assert result.exit_code == 0, result.output
    found = [line for line in result.stdout.splitlines() if line.startswith("estimated ")]
    assert re.fullmatch(
        r"estimated here: .+ on this machine's \d+ cores, at 40% of the \d+ GFLOP/s that a .* now", found[0]
    )
    assert found[1].startswith("estimated samples: 77 images at 15 steps, ")
    assert found[2].startswith("estimated decoding: 77 images, ")
    assert found[3].startswith("estimated total: ")
    assert found[4].startswith("estimated on: one NVIDIA H100")


def test_where_no_gpu_would_do_the_work_its_time_is_that_of_the_processor_as_measured(monkeypatch):
    config = tiny_config("compute.device=auto")
    monkeypatch.setattr(costs, "driver_is_there", lambda: True)
    assert costs.processor_at_hand(config) is None
    assert costs.processor_at_hand(tiny_config("compute.device=cpu")) is not None
    monkeypatch.setattr(costs, "driver_is_there", lambda: False)
    costs.measured_processor.cache_clear()
    before = time.perf_counter()
    found = costs.processor_at_hand(config)
    # the fastest product was at least as fast as the average of all
    assert found.peak >= costs.PRODUCTS * 2 * costs.PRODUCT_SIDE**3 / (time.perf_counter() - before)
    assert found.cores == len(os.sched_getaffinity(0))
    slow = Processor(2, 1e9)
    parts = finetuning_work(config, ROW, 5, 8.0)
    assert [part.seconds_on(slow) for part in parts] == [pytest.approx(part.flops / 0.4e9) for part in parts]
    monkeypatch.setattr(costs, "processor_at_hand", lambda _: slow)
    lines = costs.cost_lines(config, [replace(parts[1], flops=4e12)], None)
    assert lines["estimated here"] == (
        "2.8 hours on this machine's 2 cores, at 40% of the 1 GFLOP/s that a matrix product reaches now"
    )


def test_with_rates_at_hand_the_time_is_extrapolated_from_them_and_says_so():
    config = tiny_config("privacy.k=3 train.grid_every=2 sampling.n=6")
    rates = Rates("a GPU", "10 steps of 16 rows and 100 images", row=0.5, image=2.0, encode=0.25)
    parts = [*finetuning_work(config, ROW, 5, 8.0, rates), *sampling_work(config, ROW, rates)]
    assert [part.seconds for part in parts] == [40 * 0.25, 5 * 24 * 0.5, 4 * 8 * 2.0, 6 * 2.0]
    lines = estimate_lines(parts, rates)
    assert lines["estimated total"] == "2.4 minutes"
    assert lines["estimated on"].startswith("a GPU: measured on 10 steps of 16 rows and 100 images of dummy data")
    assert "computed" not in " ".join(lines.values())


@pytest.mark.slow
def test_rates_are_measured_on_the_device_at_hand_without_any_data(tmp_path, monkeypatch):
    """Measure for real, on the CPU, with fewer images: more sampling steps take longer."""
    from dp_lora.training import measure

    monkeypatch.setattr(measure, "IMAGES", 4)
    monkeypatch.setattr(measure, "STEPS", 3)
    config = tiny_config("compute.physical_batch_size=4 sampling.batch_size=4 sampling.steps=2")
    rates = measure.measure_rates(config, tiny_model(tmp_path), 8, torch.device("cpu"))
    assert min(rates.row, rates.image, rates.encode) > 0
    assert rates.basis == "3 steps of 8 rows and 4 images"
    more = replace(config, sampling=replace(config.sampling, steps=50))
    assert measure.measure_rates(more, tiny_model(tmp_path), 8, torch.device("cpu")).image > 3 * rates.image
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert rates_at_hand(config, tmp_path / "no-base") is None  # a GPU without a base has nothing to measure
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert rates_at_hand(config, tmp_path) is None


def test_a_dry_run_warns_of_a_noise_ratio_above_1_2_and_says_what_lowers_it(tmp_path, monkeypatch):
    make_base(tmp_path / "base", tiny_config())
    monkeypatch.setattr(dry_run_facts, "count_flops", lambda *_: ROW)

    def said(more):
        config = tiny_config(f"model.base={tmp_path / 'base'} {more}")
        return dry_run_facts.finetuning_facts(resolve(config))["noise ratio"]

    high, low = said("privacy.eps=0.5 lora.train=AB"), said("privacy.eps=100")
    assert float(low) < 1.2
    assert "with a few hundred pictures no setting helps" in high
    ratio, _, helps = high.partition(", above 1.2: ")
    assert float(ratio) > 1.2
    assert all(help in helps for help in ("more pictures", "a larger batch", "a larger eps", "lora.train=B", "rank"))
    # what is set already is no advice
    least = said("privacy.eps=0.1 lora.rank=1 lora.train=B")
    assert "above 1.2" in least
    assert not any(help in least for help in ("lora.train=B", "lower rank"))
