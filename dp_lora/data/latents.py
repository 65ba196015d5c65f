"""Pictures as latents, encoded once and kept as a memory-mapped file."""

from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from dp_lora.data.layout import Dataset
from dp_lora.data.mapped import mapped_again, mapped_rows, record_rows, recorded_rows
from dp_lora.data.pixels import to_pixels
from dp_lora.errors import InputError
from dp_lora.events import Events
from dp_lora.files import digest_value, exclusive, fsync, private_folder
from dp_lora.models.autoencoder import encode, shrinks
from dp_lora.models.device import full_precision
from dp_lora.models.folder import module_digest
from dp_lora.progress import PERCENT, progress
from dp_lora.sources import digest_code
from dp_lora.team import Team

CODE = "data/latents.py"  # latents depend on the pictures, the weights, this file and all that it imports
LIBRARIES = ("torch", "diffusers")
RECORD_EVERY = 50  # batches between two records of progress
ENCODE_VALUES = 2**22  # pixel values encoded at once, whatever the batch size: bounds the encoder's memory


def encode_dataset(
    dataset: Dataset,
    vae: Any,
    cache_folder: Path,
    device: torch.device | str,
    batch_size: int,
    events: Events,
    team: Team = Team(),  # noqa: B008 (frozen)
) -> np.memmap:
    """Normalised latents of all pictures, read-only float32 (N, c, h, w), in the dataset's order; vae on `device`.

    As `encode` gives them, TF32 off. Kept in `cache_folder` (0700, files 0600) under the digest of data, autoencoder,
    kind of device, CODE and LIBRARIES, so that none can change unseen. The file appears when it is complete; an
    interrupted encoding resumes where it stopped. Memory does not grow with N, nor with `batch_size` beyond
    ENCODE_VALUES pixel values. The ranks of `team` take a batch each, the first one writes. Raises InputError for
    latents that are not finite.
    """
    side = dataset.size // shrinks(vae)
    shape = (len(dataset), vae.config["latent_channels"], side, side)
    device = torch.device(device)
    made_by = [device.type, digest_code(CODE), *map(version, LIBRARIES)]
    key = digest_value([dataset.digest(), module_digest(vae), shape, made_by])
    path = private_folder(Path(cache_folder)) / f"{key[:32]}.npy"
    # two runs on the same data: the second one waits and finds the file
    with exclusive(path.with_suffix(".lock"), wait=True) if team.first else nullcontext():
        if not team.once(path.exists()):
            with full_precision():
                _encode_to(path, dataset, vae, shape, device, batch_size, events, team)
        team.once()  # the other ranks wait here for the file
    return cast(np.memmap, np.load(path, mmap_mode="r", allow_pickle=False))


@torch.inference_mode()
def _encode_to(
    path: Path,
    dataset: Dataset,
    vae: Any,
    shape: tuple[int, int, int, int],
    device: torch.device,
    batch_size: int,
    events: Events,
    team: Team,
) -> None:
    batch_size = max(1, min(batch_size, ENCODE_VALUES // (dataset.size**2 * dataset.channels)))
    unfinished, record = path.with_suffix(".part.npy"), path.with_suffix(".part.json")

    def encoded(start: int) -> np.ndarray:
        images = dataset.images(slice(start, min(len(dataset), start + batch_size)))
        # pad the last batch: otherwise one added picture changes its shape, and with it the kernels for other pictures
        padded = np.concatenate([images, np.zeros((batch_size - len(images), *images.shape[1:]), images.dtype)])
        return encode(vae, to_pixels(padded).to(device)).float().cpu().numpy()[: len(images)]

    if not team.first:
        list(team.map(encoded))
        return
    done = recorded_rows(record) if unfinished.exists() else 0
    if done:
        events.terminal("latents: going on where an earlier run stopped")
        latents = mapped_again(unfinished)
    else:
        latents = mapped_rows(unfinished, np.float32, shape)
    with progress(total=len(dataset), initial=done, desc="latents", bar_format=PERCENT) as bar:
        starts = range(done, len(dataset), batch_size)
        for number, batch in enumerate(team.map(encoded, starts), start=1):
            if not np.isfinite(batch).all():
                raise InputError("latents: the autoencoder gives NaN or infinite values; train it anew with a lower lr")
            latents[done : done + len(batch)] = batch
            done += len(batch)
            bar.update(len(batch))
            if number % RECORD_EVERY == 0:
                record_rows(record, done, [latents])
    latents.flush()
    del latents
    unfinished.replace(path)
    fsync(path.parent)
    record.unlink(missing_ok=True)
