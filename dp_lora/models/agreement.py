"""Check a config against an existing model: its schedule and its heads, which no tensor's shape shows.

A wrong value loads silently and computes something else. The code released with the study has both faults: its
fine-tuning configurations name a cosine schedule, which the checkpoint's buffers then replace, and 4 heads for a model
pretrained with 2.
"""

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from dp_lora.config.schema import Ldm
from dp_lora.diffusion import make_scheduler
from dp_lora.errors import InputError
from dp_lora.models.unet import heads

# betas are kept in float32; those of two configurations differ by 1e-4 and more
BETAS_TOLERANCE = 1e-6


def check_agreement(ldm: Ldm, unet: UNet2DConditionModel, scheduler: DDIMScheduler, whose: str) -> None:
    """Raise InputError where `ldm` contradicts a model; `whose` names it in the message, as in "the base's".

    Heads are compared where the widths are the config's own.
    """
    check_schedule(ldm, scheduler.betas, whose)
    prediction_type = scheduler.config["prediction_type"]
    if ldm.prediction_type != prediction_type:
        raise InputError(
            f"ldm.prediction_type={ldm.prediction_type}: {whose} prediction_type is {prediction_type}; set it so"
        )
    widths = list(unet.config["block_out_channels"])
    if widths != list(ldm.block_out_channels):
        return
    wanted, found = (_per_level(value, widths) for value in (heads(ldm), unet.config["attention_head_dim"]))
    # the middle, which has the last width, always attends
    attends = ["CrossAttn" in kind for kind in unet.config["down_block_types"][:-1]] + [True]
    if any(here and a != b for here, a, b in zip(attends, wanted, found, strict=True)):
        key = "attention_head_width" if ldm.attention_heads is None else "attention_heads"
        raise InputError(
            f"ldm.{key}={getattr(ldm, key)}: gives {wanted} attention heads at the widths {widths}, but {whose} are "
            f"{found}; another number computes another function"
        )


def _per_level(value: int | list[int] | tuple[int, ...], widths: list[int]) -> list[int]:
    return [value] * len(widths) if isinstance(value, int) else list(value)


def check_schedule(ldm: Ldm, betas: Tensor, whose: str) -> None:
    """Raise InputError where the schedule that `ldm` names is not `betas` (T,); it names the settings that are."""
    expected = make_scheduler(ldm.beta_schedule, ldm.beta_start, ldm.beta_end, ldm.prediction_type, len(betas)).betas
    if _equal(expected, betas):
        return
    raise InputError(
        f"ldm.beta_schedule={ldm.beta_schedule}, ldm.beta_start={ldm.beta_start:g}, ldm.beta_end={ldm.beta_end:g}: "
        f"contradicts {whose} own betas, which the model was trained with and which go from {float(betas[0]):.4g} to "
        f"{float(betas[-1]):.4g}; {_advice(betas)}"
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    return bool((a.double() - b.double()).abs().max() <= BETAS_TOLERANCE)


def _advice(betas: Tensor) -> str:
    start, end = float(betas[0]), float(betas[-1])
    for name in ("linear", "cosine"):
        if 0 < start < end < 1 and _equal(make_scheduler(name, start, end, "epsilon", len(betas)).betas, betas):
            numbers = f" ldm.beta_start={start:.4g} ldm.beta_end={end:.4g}" if name == "linear" else ""
            return f"set ldm.beta_schedule={name}{numbers}"
    return "no ldm.beta_schedule gives these"
