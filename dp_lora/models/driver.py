"""Whether this machine has a GPU's driver: without it PyTorch, which takes seconds to import, sees no GPU."""

import ctypes
import os
from contextlib import suppress

DRIVERS = ("libcuda.so.1", "libamdhip64.so")  # of NVIDIA, and of AMD for PyTorch's builds for ROCm


def driver_is_there() -> bool:
    """True where a driver can be loaded; PyTorch may still see no GPU then."""
    for name in DRIVERS:
        with suppress(OSError):
            ctypes.CDLL(name)
            return True
    return False


def no_gpu() -> str:
    """One line for compute.device=cuda on a machine without a GPU."""
    # only the image sets DPLORA_LOCK
    start = "start the container with `mlflow run . -A gpus=all`, or " if "DPLORA_LOCK" in os.environ else ""
    return (
        f"compute.device=cuda: PyTorch sees no GPU here; {start}set overrides='compute.device=cpu' to go on without one"
    )
