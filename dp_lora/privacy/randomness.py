"""Where the randomness of the private step comes from.

Default: 256 bits from the operating system for every stream and step, never stored; a generator keeps 192 of them.
Reproducible mode: the bits are HMAC-SHA256(secret, digest of the run | stream | step), so that no two plans share
noise and a step can be replayed. The bits seed statistical generators (numpy's SFC64), not cryptographic ones. Torch's
own CPU generator is not used: it keeps only 32 bits of its seed, few enough to try them all.
"""

import hashlib
import hmac
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dp_lora.errors import InputError

MIN_SECRET_BYTES = 16
POOL_SIZE = 8  # words of 32 bits: numpy's default of 4 would mix all entropy down to 128 bits


@dataclass(frozen=True, repr=False)
class Randomness:
    """Keyed streams of one run; `secret` None means fresh entropy. Not shown in logs: it has no repr."""

    run_digest: str
    secret: bytes | None = None

    @property
    def fresh(self) -> bool:
        return self.secret is None

    def _bits(self, stream: str, step: int) -> bytes:
        if self.secret is None:
            return os.urandom(32)
        return hmac.new(self.secret, f"{self.run_digest}|{stream}|{step}".encode(), hashlib.sha256).digest()

    def numpy(self, stream: str, step: int) -> np.random.Generator:
        """Generator of one stream of one step: who takes part, or the noise.

        Guarantee: with fresh randomness two calls share their bits with probability 2^-192 only. In the reproducible
        mode each (run, stream, step) has one generator, and no two share one; unpredictable without the secret.
        """
        seed = np.random.SeedSequence(int.from_bytes(self._bits(stream, step)), pool_size=POOL_SIZE)
        return np.random.Generator(np.random.SFC64(seed))

    def digest(self, tensors: Mapping[str, torch.Tensor]) -> str | None:
        """Keyed digest of a step's sum, which shows that a replay is exact; None with fresh randomness.

        Guarantee: tells nothing of the sum without the secret; two sums with one digest are equal bit for bit.
        """
        if self.secret is None:
            return None
        total = hmac.new(self.secret, b"sum", hashlib.sha256)
        for name in sorted(tensors):
            total.update(name.encode() + tensors[name].detach().cpu().contiguous().numpy().tobytes())
        return total.hexdigest()

    def per_item(self, stream: str, step: int) -> "ItemStreams":
        """One stream for each item of a step.

        Guarantee: an item's draws do not depend on which other items take part.
        """
        return ItemStreams(int.from_bytes(self._bits(stream, step)))


class ItemStreams:
    """Independent generators by item number; each continues where it stopped."""

    def __init__(self, entropy: int) -> None:
        self._entropy = entropy
        self._open: dict[int, np.random.Generator] = {}

    def __getitem__(self, item: int) -> np.random.Generator:
        if item not in self._open:
            seed = np.random.SeedSequence(self._entropy, spawn_key=(item,), pool_size=POOL_SIZE)
            self._open[item] = np.random.Generator(np.random.SFC64(seed))
        return self._open[item]

    def from_the_start(self) -> "ItemStreams":
        """The same streams, each at its first draw again.

        Guarantee: a repeated computation draws the same numbers as before.
        """
        return ItemStreams(self._entropy)


def read_secret(path: Path) -> bytes:
    """Read the operator's seed file; InputError unless it is a private file of at least 16 bytes.

    Guarantee: the bytes go to `Randomness` alone: no log, config, store or release holds them.
    """
    try:
        mode = path.stat().st_mode
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"privacy.seed_file={path}: cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(mode) or mode & 0o077:
        raise InputError(f"privacy.seed_file={path}: must be readable by its owner alone; chmod 600 {path}")
    if len(content) < MIN_SECRET_BYTES:
        raise InputError(
            f"privacy.seed_file={path}: must hold at least {MIN_SECRET_BYTES} random bytes; "
            f"head -c 32 /dev/urandom > {path}"
        )
    return content
