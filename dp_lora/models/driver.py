"""Whether this machine has NVIDIA's driver: without it PyTorch, which takes seconds to import, sees no GPU."""

import ctypes
import os

DRIVER = "libcuda.so.1"


def driver_is_there() -> bool:
    """True where the driver can be loaded; PyTorch may still see no GPU then."""
    try:
        ctypes.CDLL(DRIVER)
    except OSError:
        return False
    return True


def no_gpu() -> str:
    """One line for compute.device=cuda on a machine without a GPU."""
    # only the image sets DPLORA_LOCK
    start = "start the container with `mlflow run . -A gpus=all`, or " if "DPLORA_LOCK" in os.environ else ""
    return (
        f"compute.device=cuda: PyTorch sees no GPU here; {start}set overrides='compute.device=cpu' to go on without one"
    )
