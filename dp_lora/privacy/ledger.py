"""The record of every step whose noise was, or may have been, drawn. The accountant's history is this file alone."""

import errno
import hashlib
import json
import os
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dp_lora.errors import InputError
from dp_lora.files import fsync
from dp_lora.privacy.plan import PrivacyPlan

REPLAY = "replay"
FRESH = "fresh"
MECHANISM = ("sample_rate", "noise_multiplier", "max_grad_norm")  # what a line says of its plan


@dataclass
class _Lines:
    """What whole and torn lines say, taken in the order of the file."""

    size: int = 0  # bytes of the file up to here
    count: int = 0
    before: str = ""  # SHA-256 of the last line
    mechanism: tuple[Any, ...] | None = None  # the same in every line
    fresh: int = 0
    torn: int = 0
    replayed: dict[int, str] = field(default_factory=dict)  # step -> keyed digest of its sum before noise

    def take(self, line: bytes, path: Path) -> None:
        """Add one line, without its end; InputError for one that was changed or moved, or is of another plan.

        Guarantee: a line is counted, as fresh, replayed or torn, or the ledger is refused; none is passed over.
        """
        where = f"{path}: line {self.count + 1}"
        try:
            record = json.loads(line)
            entry, checksum = record["entry"], record["crc32"]
        except (ValueError, KeyError, TypeError):
            self.torn += 1
        else:
            if _checksum(entry) != checksum:
                raise InputError(f"{where}: the checksum does not hold; the ledger was changed")
            if entry.get("before") != self.before:
                raise InputError(f"{where}: does not follow the line before; lines were removed, moved or changed")
            mechanism = tuple(entry[name] for name in MECHANISM)
            if self.mechanism not in (None, mechanism):
                raise InputError(f"{where} belongs to another plan; start in another folder")
            self.check_replay(entry["step"], entry.get("sum"), path)
            self.mechanism = mechanism
            if entry["randomness"] == REPLAY:
                self.replayed[entry["step"]] = entry["sum"]
            else:
                self.fresh += 1
        self.count += 1
        self.before = hashlib.sha256(line).hexdigest()

    def check_replay(self, step: int, replay_of: str | None, path: Path) -> None:
        """InputError for a step with another sum than it had before, or for fresh and replayed steps together.

        Guarantee: what passes is the first sum of its step, or the same one again.
        """
        if (self.fresh and replay_of is not None) or (self.replayed and replay_of is None):
            raise InputError(f"{path}: step {step}: fresh and replayed steps in one ledger; start in another folder")
        if self.replayed.get(step, replay_of) != replay_of:
            raise InputError(
                f"{path}: step {step} was taken before with another sum: the replay is not exact on this "
                "machine or with these settings; go on where it was exact, or start in another folder"
            )


@dataclass
class Ledger:
    """One JSON line per step, appended and fsynced before the step's noise is drawn; nothing is ever rewritten.

    Each line holds a checksum of its own and the digest of the line before, so that a line that is removed, moved or
    changed in the middle is seen. Lines that are lost at the end are seen where a checkpoint counts more steps. A
    ledger is read once, line by line as it grows: keep one object per run.
    """

    path: Path
    _lines: _Lines = field(default_factory=_Lines, init=False, repr=False, compare=False)

    def append(self, step: int, plan: PrivacyPlan, *, replay_of: str | None) -> None:
        """Write the line of `step`; on return it is on the disk.

        `replay_of`: None with fresh randomness; in the reproducible mode a keyed digest of the sum before noise. Where
        the step stands in the ledger with another digest, the replay is not exact: two sums under one noise would
        reveal their difference, so InputError.

        Guarantee: if the noise of a step can have been seen by anybody, its line is in the ledger; and one noise is
        never added to two different sums.
        """
        lines, torn_tail = self._read(plan)
        lines.check_replay(step, replay_of, self.path)
        entry: dict[str, Any] = {
            "step": step,
            **dict(zip(MECHANISM, _mechanism(plan), strict=True)),
            "randomness": FRESH if replay_of is None else REPLAY,
            "before": lines.before,
        }
        if replay_of is not None:
            entry["sum"] = replay_of
        line = json.dumps({"entry": entry, "crc32": _checksum(entry)}, sort_keys=True) + "\n"
        if torn_tail:
            line = "\n" + line  # a torn line keeps its place, and is counted
        created = not self.path.exists()
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            if os.write(descriptor, line.encode()) != len(line.encode()):
                # a full disk; no noise was drawn for this line, so it may go
                os.ftruncate(descriptor, size)
                os.fsync(descriptor)
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
        have been drawn. Torn lines of a replay are steps of the plan too, so all are never more than plan.steps. A
        whole line whose checksum fails, that does not follow the line before, or of another plan, is an InputError.

        Guarantee: never fewer than the number of distinct noisy sums that were computed.
        """
        lines, _ = self._read(plan)
        if lines.replayed:
            return min(len(lines.replayed) + lines.torn, plan.steps)
        return lines.fresh + lines.torn

    def _read(self, plan: PrivacyPlan) -> tuple[_Lines, bool]:
        """All lines, of which only new ones are read, and whether the last one has no end."""
        known = self._lines
        content = b""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < known.size:
            raise InputError(f"{self.path}: was shortened while it was in use; restore it, or start in another folder")
        if size > known.size:
            with self.path.open("rb") as file:
                file.seek(known.size)
                content = file.read()
        *ended, tail = content.split(b"\n")
        for line in ended:
            if line:
                known.take(line, self.path)
            known.size += len(line) + 1
        lines = known
        if tail:
            # whoever writes next ends this line; until then it is looked at, and not kept
            lines = replace(known, replayed=dict(known.replayed))
            lines.take(tail, self.path)
        if lines.mechanism not in (None, _mechanism(plan)):
            raise InputError(f"{self.path}: belongs to another plan; start in another folder")
        return lines, bool(tail)


def _mechanism(plan: PrivacyPlan) -> tuple[Any, ...]:
    return (plan.sample_rate, plan.noise_multiplier, plan.max_grad_norm if plan.private else "inf")


def _checksum(entry: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(entry, sort_keys=True).encode())
