"""Speed of a fine-tuning and its sampling on this device: some steps and images on dummy data, to extrapolate.

No private picture is read, and nothing is written.
"""

import time
from collections.abc import Callable

import torch

from dp_lora.config.schema import Config
from dp_lora.models.autoencoder import encode
from dp_lora.models.device import full_precision
from dp_lora.models.estimate import Rates
from dp_lora.models.folder import Model
from dp_lora.sampling import draw
from dp_lora.training.finetune import make_adapter
from dp_lora.training.physical_batch import dummy_sum, rows_at_a_time

STEPS, IMAGES = 10, 100
ENCODED_AT_ONCE = 4


def measure_rates(config: Config, model: Model, expected_rows: int, device: torch.device) -> Rates:
    """Seconds per row over STEPS private steps, and per picture over IMAGES drawn, or encoded, on `device`.

    A step here is two micro-batches of as many rows as the run would take at a time. Adds an adapter to `model`. Each
    part runs once before it is timed.
    """
    parameters = make_adapter(config, model, device).parameters(config.lora.train)
    k = config.privacy.k
    rows = min(expected_rows, rows_at_a_time(config, model, parameters, device, k, expected_rows))
    batch = min(config.sampling.batch_size, IMAGES)
    size = (ENCODED_AT_ONCE, model.info["channels"], model.info["size"], model.info["size"])

    def sample() -> object:
        return draw(model, [0] * batch, list(range(batch)), config.sampling, config.experiment.seed, device)

    @torch.no_grad()
    def encode_some() -> object:
        with full_precision():
            return encode(model.vae, torch.zeros(size, device=device)).cpu()

    return Rates(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU",
        basis=f"{STEPS} steps of {2 * rows:,} rows and {IMAGES} images",
        row=_seconds(lambda: dummy_sum(config, model, parameters, device, k, rows), STEPS) / (2 * rows),
        image=_seconds(sample, -(-IMAGES // batch)) / batch,
        encode=_seconds(encode_some, IMAGES // ENCODED_AT_ONCE) / ENCODED_AT_ONCE,
    )


def _seconds(work: Callable[[], object], times: int) -> float:
    """Mean seconds of one call over `times` calls; `work` ends on the CPU, so the device has finished its part."""
    work()
    began = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - began) / times
