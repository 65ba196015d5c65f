"""The record of every step whose noise was, or may have been, drawn. The accountant's history is this file alone."""

import errno
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dp_lora.errors import InputError
from dp_lora.files import fsync
from dp_lora.privacy.plan import PrivacyPlan

REPLAY = "replay"
FRESH = "fresh"


@dataclass(frozen=True)
class Ledger:
    """One JSON line per step, appended and fsynced before the step's noise is drawn; nothing is ever rewritten."""

    path: Path

    def append(self, step: int, plan: PrivacyPlan, *, replay_of: str | None) -> None:
        """Write the line of `step`; on return it is on the disk.

        `replay_of`: None with fresh randomness; in the reproducible mode a keyed digest of the sum before noise. Where
        the step stands in the ledger with another digest, the replay is not exact: two sums under one noise would
        reveal their difference, so InputError.

        Guarantee: if the noise of a step can have been seen by anybody, its line is in the ledger; and one noise is
        never added to two different sums.
        """
        entry: dict[str, Any] = {
            "step": step,
            "sample_rate": plan.sample_rate,
            "noise_multiplier": plan.noise_multiplier,
            "max_grad_norm": plan.max_grad_norm if plan.private else "inf",
            "randomness": FRESH if replay_of is None else REPLAY,
        }
        if replay_of is not None:
            entry["sum"] = replay_of
            whole, _ = self._read(plan)
            if any(other["step"] == step and other.get("sum") != replay_of for other in whole):
                raise InputError(
                    f"{self.path}: step {step} was taken before with another sum: the replay is not exact on this "
                    "machine or with these settings; go on where it was exact, or start in another folder"
                )
        line = json.dumps({"entry": entry, "crc32": _checksum(entry)}, sort_keys=True) + "\n"
        created = not self.path.exists()
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = "\n" + line  # a torn line keeps its place, and is counted
            if os.write(descriptor, line.encode()) != len(line.encode()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if created:
            fsync(self.path.parent)

    def counted_steps(self, plan: PrivacyPlan) -> int:
        """Number of steps that the accountant must count.

        With fresh randomness every line counts: a step that was lost in a crash and done again was released twice. An
        exact replay of a step is the same release, so it counts once. A torn line counts as a step: its noise may
        have been drawn. A whole line whose checksum fails, or one of another plan, is an InputError.

        Guarantee: never fewer than the number of distinct noisy sums that were computed.
        """
        whole, torn = self._read(plan)
        fresh = sum(entry["randomness"] != REPLAY for entry in whole)
        return fresh + len(self.replayed_steps(plan)) + torn

    def replayed_steps(self, plan: PrivacyPlan) -> set[int]:
        """Steps of the reproducible mode that stand in whole lines: taking one again is the same release."""
        return {entry["step"] for entry in self._read(plan)[0] if entry["randomness"] == REPLAY}

    def _read(self, plan: PrivacyPlan) -> tuple[list[dict[str, Any]], int]:
        """The entries of whole lines, and the number of torn ones."""
        if not self.path.exists():
            return [], 0
        whole: list[dict[str, Any]] = []
        torn = 0
        for number, line in enumerate(self.path.read_bytes().split(b"\n"), 1):
            if not line:
                continue
            try:
                record = json.loads(line)
                entry, checksum = record["entry"], record["crc32"]
            except (ValueError, KeyError, TypeError):
                torn += 1
                continue
            if _checksum(entry) != checksum:
                raise InputError(f"{self.path}: line {number}: the checksum does not hold; the ledger was changed")
            if (entry["sample_rate"], entry["noise_multiplier"]) != (plan.sample_rate, plan.noise_multiplier):
                raise InputError(f"{self.path}: line {number} belongs to another plan; start in another folder")
            whole.append(entry)
        return whole, torn


def _checksum(entry: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(entry, sort_keys=True).encode())
