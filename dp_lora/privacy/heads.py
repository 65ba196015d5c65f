"""The growth of each ledger in this place, recorded beside the working folders: it exposes an older copy of a ledger.

A ledger cannot know that its folder was copied, or restored from a backup, and that its later steps are elsewhere. So
runs/.heads holds a file per ledger, to which every step appends the ledger's number of lines and the digest of them all
(its chain).

Claim: if the noise of a step was drawn here, no ledger that lacks the step's line is read here, as long as runs/.heads
stands.

Proof. (1) The order of a step is: the ledger's line on the disk, its head here on the disk, the noise. So where noise
was drawn, the digest of all lines up to its step's stands here. (2) A ledger is read only where it has the last head
that stands here: that digest, after that many lines; so it has these very lines. (3) The last head follows all earlier
ones: whoever appended it had read a ledger that passed (2), and one process at a time holds the file (`run_folder`
locks it, so that two copies of a folder are not written to at once).

The other order, the head first, would refuse a folder after an ordinary crash between the two writes. In this order
such a crash leaves a ledger that is one line ahead of its head: that line counts, and has no noise. A head that was
torn in a crash has no noise either, and is skipped; the ledger's line before it stands.

This place cannot see steps that were taken elsewhere (a folder from another machine is unknown here, and is accepted),
nor that runs/ as a whole was restored or forged together with runs/.heads. The ledger's head in each privacy.json tells
such branches apart.

A head says nothing of the data without the operator's secrets: see `Ledger.head`. Its number of lines counts the steps,
whose number is public, and the steps that were lost in crashes.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from dp_lora.files import append_line, fsync, private_folder

FOLDER = ".heads"


@dataclass(frozen=True)
class Head:
    """A ledger's number of lines, torn ones included, and its chain after them; 0 lines: nothing was seen."""

    lines: int = 0
    digest: str = ""


@dataclass(frozen=True)
class Heads:
    """The file of one ledger's heads, one JSON line each; nothing in it is ever rewritten."""

    path: Path

    def make(self) -> None:
        """Make the file, empty, where it is missing; its owner's alone, and on the disk on return.

        Guarantee: a head that is appended later is not lost with its file's name.
        """
        private_folder(self.path.parent)
        self.path.touch(mode=0o600)
        fsync(self.path.parent)
        fsync(self.path.parent.parent)

    def last(self) -> Head:
        """The newest head; torn lines are skipped.

        Guarantee: every step whose noise was drawn here is at or before it.
        """
        head = Head()
        for line in self.path.read_bytes().split(b"\n") if self.path.exists() else ():
            try:
                head = Head(**json.loads(line))
            except (ValueError, TypeError):
                continue
        return head

    def append(self, head: Head) -> None:
        """Note `head`; on return it is on the disk.

        Guarantee: a ledger without this head is not read here any more.
        """
        append_line(self.path, json.dumps(asdict(head)))
