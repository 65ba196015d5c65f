"""The device and the precision of the networks."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dp_lora.errors import InputError
from dp_lora.models.driver import no_gpu


def pick_device(name: str) -> torch.device:
    """The device of compute.device: cpu, cuda, or auto (cuda where there is one). InputError for cuda without a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(no_gpu())
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def pick_precision(name: str, device: torch.device, key: str = "compute.precision") -> torch.dtype:
    """The type that the config's `key`, of value `name`, gives to a forward pass on `device`.

    auto: bfloat16 on a GPU that has it, float32 elsewhere: on a CPU bfloat16 may be many times slower.
    InputError for bfloat16 on a GPU without it, and for a name that is none of these.
    """
    if name not in ("auto", "float32", "bfloat16"):
        raise InputError(f"{key}={name}: must be one of auto, float32, bfloat16")
    there = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "bfloat16" and device.type == "cuda" and not there:
        raise InputError(f"{key}=bfloat16: this GPU has none; set {key}=float32")
    return torch.bfloat16 if name == "bfloat16" or (name == "auto" and there) else torch.float32


def precision_name(precision: torch.dtype) -> str:
    """As configs spell it: float32 or bfloat16."""
    return str(precision).removeprefix("torch.")


@contextmanager
def full_precision() -> Iterator[None]:
    """On a GPU: no TF32 and no algorithm picked by timing, so that an image is the same in every batch and run."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
