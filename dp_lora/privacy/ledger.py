"""The record of every step whose noise was, or may have been, drawn. The accountant's history is this file alone."""

import hashlib
import json
import secrets
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dp_lora.errors import InputError
from dp_lora.files import append_line, digest_value
from dp_lora.privacy.heads import Head, Heads
from dp_lora.privacy.plan import FLAT, PrivacyPlan

REPLAY = "replay"
FRESH = "fresh"
ONE_BRANCH = "restore the newest copy, or begin another fine-tuning (another experiment.seed), which spends anew"
MECHANISM = ("sample_rate", "noise_multiplier", "max_grad_norm", "clipping")  # fields of the plan that each line holds


@dataclass
class _Lines:
    """State after whole and torn lines, taken in the order of the file."""

    size: int = 0  # bytes of the file up to here
    count: int = 0
    before: str = ""  # SHA-256 of the last line; lines from before the field `chain` hold it
    chain: str = ""  # SHA-256 of the chain before the last line, followed by that line: so of all lines
    mechanism: tuple[Any, ...] | None = None  # the same in every line
    fresh: int = 0
    torn: int = 0
    replayed: dict[int, str] = field(default_factory=dict)  # step -> keyed digest of its sum before noise

    def take(self, line: bytes, path: Path) -> None:
        """Add one line, without its newline; InputError if it was changed or moved, or belongs to another plan.

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
            if entry.get("chain", entry.get("before")) != (self.chain if "chain" in entry else self.before):
                raise InputError(f"{where}: does not follow the lines before it; some were removed, moved or changed")
            known = {"clipping": FLAT, **entry}  # lines from before the field `clipping` lack it
            mechanism = tuple(known[name] for name in MECHANISM)
            if self.mechanism not in (None, mechanism):
                raise InputError(f"{where} belongs to another plan; start in another folder")
            self.check_replay(entry["step"], entry.get("sum"), path)
            self.mechanism = mechanism
            if entry["randomness"] == REPLAY:
                self.replayed[entry["step"]] = entry["sum"]
            else:
                self.fresh += 1
        self.count += 1
        self.before, self.chain = hashlib.sha256(line).hexdigest(), _chain(self.chain, line)

    def check_replay(self, step: int, replay_of: str | None, path: Path) -> None:
        """InputError for a step with another sum than it had before, or for fresh and replayed steps together.

        Guarantee: a sum that passes is the first of its step, or the same one again.
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

    Each line holds a checksum of its own and the digest of all lines before it (the chain, also through torn lines),
    which exposes a line removed, moved or changed in the middle. Lines lost at the end are noticed where `heads`, or a
    checkpoint, count more; without heads (None: nobody continues this ledger) by the checkpoint alone. A ledger is read
    once, line by line as it grows: keep one object per run.
    """

    path: Path
    heads: Heads | None = None
    _lines: _Lines = field(default_factory=_Lines, init=False, repr=False, compare=False)
    _seen: Head | None = field(default=None, init=False, repr=False, compare=False)  # the last of `heads`
    _process: str = field(default_factory=lambda: secrets.token_hex(16), init=False, repr=False, compare=False)

    def append(self, step: int, plan: PrivacyPlan, *, replay_of: str | None) -> None:
        """Write the line of `step`, then its head; on return both are on the disk.

        `replay_of`: None with fresh randomness; in the reproducible mode a keyed digest of the sum before noise. Where
        the step stands in the ledger with another digest, the replay is not exact: two sums under one noise would
        reveal their difference, so InputError. A line of fresh randomness names its process by a random id, so that
        two branches of a ledger differ. A replay's line has none: its branches differ by their sums.

        Guarantee: if the noise of a step can have been seen by anybody, its line is in the ledger, and no ledger
        without it is read here again; and one noise is never added to two different sums.
        """
        lines = self._read(plan)
        lines.check_replay(step, replay_of, self.path)
        randomness = {"randomness": FRESH, "process": self._process}
        if replay_of is not None:
            randomness = {"randomness": REPLAY, "sum": replay_of}
        mechanism = dict(zip(MECHANISM, _mechanism(plan), strict=True))
        entry: dict[str, Any] = {"step": step, **mechanism, **randomness, "chain": lines.chain}
        line = json.dumps({"entry": entry, "crc32": _checksum(entry)}, sort_keys=True)
        append_line(self.path, line)  # a torn line before it keeps its place, and is counted
        if self.heads is not None:
            head = Head(lines.count + 1, _chain(lines.chain, line.encode()))
            self.heads.append(head)
            self._seen = head

    def head(self, plan: PrivacyPlan) -> str:
        """The ledger's mark in a release, which tells two branches of one run apart: 64 hex digits.

        With fresh randomness: the digest of all lines. In the reproducible mode: the digest of all steps' keyed
        digests, equal where the releases are: a repeated replay has the same head, however often it stopped.

        Guarantee: ledgers with one head come from the same noisy sums. Whoever lacks the ledger, and the secret of a
        replay, learns nothing of the data from a head: fresh lines hold public numbers and a random id of 128 bits that
        stands nowhere else, so that not even the number of steps lost in a crash can be found by trial; a replay's
        lines hold each sum as an HMAC under the operator's secret.
        """
        lines = self._read(plan)
        return digest_value(sorted(lines.replayed.items())) if lines.replayed else lines.chain

    def counted_steps(self, plan: PrivacyPlan) -> int:
        """Number of steps that the accountant must count.

        With fresh randomness every line counts: a step that was lost in a crash and done again was released twice. An
        exact replay of a step is the same release, so it counts once. A torn line counts as a step: its noise may
        have been drawn. Torn lines of a replay are steps of the plan too, so all are never more than plan.steps.
        InputError for a whole line that fails its checksum, does not follow the line before, or is of another plan.

        Guarantee: never fewer than the number of distinct noisy sums that were computed.
        """
        lines = self._read(plan)
        if lines.replayed:
            return min(len(lines.replayed) + lines.torn, plan.steps)
        return lines.fresh + lines.torn

    def _read(self, plan: PrivacyPlan) -> _Lines:
        """All lines, the last one even without its newline; only new ones are read."""
        if self.heads is not None and self._seen is None:
            self._seen = self.heads.last()  # before the ledger, which is never behind it
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
                self._take(line, known)
            known.size += len(line) + 1
        lines = known
        if tail:
            # the next writer ends this line; until then it is looked at, but not kept
            lines = replace(known, replayed=dict(known.replayed))
            self._take(tail, lines)
        if lines.mechanism not in (None, _mechanism(plan)):
            raise InputError(f"{self.path}: belongs to another plan; start in another folder")
        if self._seen is not None and lines.count < self._seen.lines:
            raise InputError(
                f"{self.path}: holds {lines.count} lines, but {self._seen.lines} were written here: it is an older "
                f"copy, or lines were lost; {ONE_BRANCH}"
            )
        return lines

    def _take(self, line: bytes, lines: _Lines) -> None:
        lines.take(line, self.path)
        if self._seen is not None and lines.count == self._seen.lines and lines.chain != self._seen.digest:
            raise InputError(
                f"{self.path}: line {lines.count} is not the one that was written here: other steps were taken from a "
                f"copy of this folder, or the line was changed; {ONE_BRANCH}"
            )


def _mechanism(plan: PrivacyPlan) -> tuple[Any, ...]:
    clip = plan.max_grad_norm if plan.private else "inf"
    return (plan.sample_rate, plan.noise_multiplier, clip, plan.clipping)


def _chain(before: str, line: bytes) -> str:
    return hashlib.sha256(before.encode() + line).hexdigest()


def _checksum(entry: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(entry, sort_keys=True).encode())
