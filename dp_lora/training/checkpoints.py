"""Checkpoints of private fine-tuning: one safetensors file each, whole or absent, the last few kept. No pickle."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dp_lora.errors import InputError
from dp_lora.files import whole_file

KEEP = 2


class Keeper:
    """Keeps the state between two steps as a checkpoint: when it is told to, and where a signal stops the work.

    `step` and `counted` are the number of steps in the initial state, and the ledger's count then.
    """

    def __init__(self, folder: Path, tensors: Callable[[], Mapping[str, Tensor]], step: int, counted: int):
        self._folder, self._tensors = folder, tensors
        self._saved = step
        self._held: tuple[int, int] | None = (step, counted)

    def save(self) -> None:
        """Write a checkpoint if the state is newer than the last one."""
        if self._held is not None and self._held[0] > self._saved:
            save_checkpoint(self._folder, *self._held, self._tensors())
            self._saved = self._held[0]

    @contextmanager
    def taking(self, step: int, counted: int) -> Iterator[None]:
        """Inside, the state changes to that of `step`, counted from 1; no checkpoint may hold half of a step."""
        self._held = None
        yield
        self._held = (step, counted)

    @contextmanager
    def saving_when_stopped(self) -> Iterator[None]:
        """If the block is interrupted, keep the last whole state: the next process continues from it."""
        try:
            yield
        except KeyboardInterrupt:
            self.save()
            raise


def save_checkpoint(folder: Path, step: int, counted: int, tensors: Mapping[str, Tensor]) -> None:
    """Write the state after `step` steps, with the ledger's count `counted`; remove all but the last few files."""
    with whole_file(folder / f"step-{step:08d}.safetensors", private=True) as temporary:
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(state, temporary, {"counted": str(counted)})
    for path in _files(folder)[:-KEEP]:
        path.unlink()


def load_checkpoint(folder: Path) -> tuple[int, int, dict[str, Tensor]] | None:
    """The newest checkpoint's steps, ledger count and state; None where there is none."""
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
