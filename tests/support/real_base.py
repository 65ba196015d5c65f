"""A published base at its real width with random weights, and memory and time of a row of the private step on it."""

import json
import time
from pathlib import Path

import diffusers
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from benchmarks.ratios import peak_memory
from dp_lora.diffusion import make_scheduler
from dp_lora.models.adapters import use_checkpointing
from dp_lora.models.families import FAMILIES, ClassConditional
from dp_lora.models.folder import Model
from dp_lora.models.row_memory import row_memory
from dp_lora.training.finetune import make_adapter
from dp_lora.training.physical_batch import dummy_sum, rows_at_a_time
from tests.support.text2image import text_config

_CASES = json.loads(Path("tests/data/real-bases.json").read_text())
REAL = {name: {**_CASES.get(case.get("as"), {}), **case} for name, case in _CASES.items()}
FEW, MORE = 2, 6  # rows: a cost that both have once cancels in their difference
AT_MOST = 256  # rows: the upper end of the search


def real_config(case, checkpointing):
    return text_config(
        f"data.size={case['size']} lora.rank=4 compute.checkpointing={checkpointing} compute.precision=bfloat16 "
        "compute.device=auto"
    )


def real_denoiser(case, device):
    with torch.device(device):
        return getattr(diffusers, case["denoiser"]["_class_name"]).from_config(case["denoiser"])


def real_model(case, device):
    """The base in bfloat16 on `device`: its denoiser with random weights, its autoencoder without any."""
    torch.manual_seed(0)
    denoiser = real_denoiser(case, device).to(torch.bfloat16).eval().requires_grad_(False)
    shrinking = (case["size"] // case["latent"][1]).bit_length()
    with torch.device("meta"):
        vae = AutoencoderKL(
            latent_channels=case["latent"][0],
            block_out_channels=[32] * shrinking,
            down_block_types=["DownEncoderBlock2D"] * shrinking,
            up_block_types=["UpDecoderBlock2D"] * shrinking,
        )
    scheduler = make_scheduler("linear", 0.00085, 0.012, "epsilon")
    family, info = FAMILIES[case["pipeline"]], {"size": case["size"], "channels": 3, "classes": [], "null_row": False}
    return Model(denoiser, vae, scheduler, None, info, family, precision=torch.bfloat16)


def counted_row(case, lora):
    """The memory of a row, as a dry run counts it."""
    denoiser, family = real_denoiser(case, "meta"), FAMILIES[case["pipeline"]]
    if isinstance(family, ClassConditional):
        family.take_table(denoiser, 0)
    return row_memory(denoiser, family, lora, case["size"], tuple(case["latent"]), torch.bfloat16)


def measured_row(config, model, device, checkpointing, at_most=AT_MOST):
    """Bytes per row, milliseconds per row and the number of rows that fit, in the private step on `model`."""
    parameters = make_adapter(config, model, device).parameters(config.lora.train)
    if checkpointing == "always":
        use_checkpointing(model.denoiser)

    def rows(count):
        return lambda: dummy_sum(config, model, parameters, device, 1, count)

    few, more = (peak_memory(rows(count), device) for count in (FEW, MORE))
    fitting = rows_at_a_time(config, model, parameters, device, 1, at_most)
    began = time.perf_counter()
    rows(fitting)()  # it moves norms to the CPU, so this waits for the GPU
    milliseconds = 1000 * (time.perf_counter() - began) / (2 * fitting)  # two micro-batches
    return (more - few) / (MORE - FEW), milliseconds, fitting
