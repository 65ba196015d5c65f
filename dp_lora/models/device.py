"""Where the networks run."""

import torch

from dp_lora.errors import InputError


def pick_device(name: str) -> torch.device:
    """The device of compute.device: cpu, cuda, or auto (cuda where there is one). InputError for cuda without a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("compute.device=cuda: PyTorch sees no GPU here; set compute.device=cpu or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
