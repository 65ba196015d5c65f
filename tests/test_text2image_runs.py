"""Runs of text-to-image bases: a replay, a resume, two ranks, and the law of the noise on what is trained."""

import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

from dp_lora.models.adapters import EMBEDDING
from dp_lora.models.folder import load_model
from dp_lora.privacy.ledger import Ledger
from dp_lora.privacy.randomness import Randomness
from dp_lora.privacy.step import noisy_sum
from dp_lora.training import finetune as module
from dp_lora.training.private_loss import diffusion_loss
from tests.support.finetuning import Crash, seed_file
from tests.support.text2image import CPU, fine_tuned, private_data, text_config
from tests.support.tiny import plan_of
from tests.support.tiny_pipelines import BUILD, make_pipeline

FAST = "sd"
FAMILIES = [pytest.param(name, marks=() if name == FAST else pytest.mark.slow) for name in BUILD]
# several captions, and micro-batches that cut units: each picture must still get its own draws
ROWS = "privacy.k=2 compute.physical_batch_size=4"


def weights(release):
    return load_file(release / "peft/adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(BUILD))
def test_a_replay_gives_the_same_bits_also_where_it_was_stopped_and_resumed(name, tmp_path, monkeypatch):
    base = make_pipeline(tmp_path / name, name)
    seeded = f"{seed_file(tmp_path)} {ROWS}"
    unbroken, again = (weights(fine_tuned(tmp_path, base, seeded, run)) for run in ("one", "two"))
    fresh = weights(fine_tuned(tmp_path, base, ROWS, "fresh"))
    real = module.noisy_sum

    def crashing(plan, step, *rest):
        if step == 2:
            raise Crash
        return real(plan, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(module, "noisy_sum", crashing)
        with pytest.raises(Crash):
            fine_tuned(tmp_path, base, seeded, "broken")
    resumed = weights(fine_tuned(tmp_path, base, seeded, "broken"))
    for key, value in unbroken.items():
        assert torch.equal(value, again[key]), key
        assert torch.equal(value, resumed[key]), key
    assert any(not torch.equal(value, fresh[key]) for key, value in unbroken.items())
    config, model = text_config(f"{seeded} model.base={base}", name), load_model(base)
    model.info["size"] = config.data.size
    for key, value in module.make_adapter(config, model, CPU).parameters("AB").items():
        if key != EMBEDDING:
            assert not torch.equal(value, resumed[f"base_model.model.{key}.weight"]), f"{key} is at its start"


@pytest.mark.slow
@pytest.mark.parametrize("name", list(BUILD))
def test_two_ranks_release_the_weights_of_one(name, tmp_path):
    base = make_pipeline(tmp_path / name, name)
    script = [
        sys.executable,
        "-m",
        "tests.support.text_ranks",
        str(tmp_path),
        str(base),
        f"{seed_file(tmp_path)} {ROWS}",
    ]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    alone, both = (weights(tmp_path / f"on-{size}/release") for size in (1, 2))
    assert max(float((both[key] - value).abs().max()) for key, value in alone.items()) < 1e-5
    assert (tmp_path / "on-1/ledger.jsonl").read_text().count("\n") == (
        tmp_path / "on-2/ledger.jsonl"
    ).read_text().count("\n")


@pytest.mark.parametrize("name", FAMILIES)
def test_all_that_is_trained_gets_the_stated_noise_and_no_number_goes_without(name, tmp_path):
    """With an empty draw `noisy_sum` gives the noise alone: sigma * C * N(0, 1) on each trained number."""
    config = text_config("", name)
    model = load_model(make_pipeline(tmp_path / name, name))
    model.info["size"] = config.data.size
    parameters = module.make_adapter(config, model, CPU).parameters("AB")
    data = private_data(config, model, tmp_path / "captions")
    loss = diffusion_loss(config, model, data.latents, data.labels, CPU, data.captions)
    plan = plan_of(sample_rate=1e-9, max_grad_norm=0.5)
    total, facts = noisy_sum(
        plan, 0, data.units, loss, parameters, Randomness("run", b"s" * 32), Ledger(tmp_path / "ledger.jsonl"), 8
    )
    assert facts.units == 0
    assert total.keys() == parameters.keys()
    numbers = torch.cat([value.flatten() for value in total.values()]) / (plan.noise_multiplier * plan.max_grad_norm)
    assert len(numbers) == sum(value.numel() for value in parameters.values()) > 100
    assert stats.kstest(numbers.numpy(), "norm").pvalue > 1e-3
    assert abs(float(numbers.std()) - 1) < 5 / math.sqrt(2 * len(numbers))
