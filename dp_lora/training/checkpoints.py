"""Checkpoints of private fine-tuning: one safetensors file each, whole or absent, the last few kept. No pickle."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dp_lora.errors import InputError
from dp_lora.files import whole_file

KEEP = 2


def save_checkpoint(folder: Path, step: int, counted: int, tensors: Mapping[str, Tensor]) -> None:
    """Write the state after `step` steps, of which the ledger counted `counted`; all but the last few are removed."""
    with whole_file(folder / f"step-{step:08d}.safetensors", private=True) as temporary:
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(state, temporary, {"counted": str(counted)})
    for path in _files(folder)[:-KEEP]:
        path.unlink()


def load_checkpoint(folder: Path) -> tuple[int, int, dict[str, Tensor]] | None:
    """Steps, the ledger's count then, and the state, of the newest checkpoint; None where there is none."""
    files = _files(folder)
    if not files:
        return None
    try:
        with safe_open(files[-1], framework="pt") as file:
            step = int(files[-1].stem.removeprefix("step-"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return step, int((file.metadata() or {})["counted"]), state
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{files[-1]}: cannot be read ({error}); remove it to go on from the one before") from None


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.safetensors"))
