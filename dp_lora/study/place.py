"""Where a member of a study lies, and what is known of it: one folder and one record, whole at any instant."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from dp_lora.config import ROOT, STAGES, Config, flatten
from dp_lora.files import digest_value, read_json, write_json
from dp_lora.sources import digest_code
from dp_lora.study.grid import Grid, config_of, identity
from dp_lora.study.result import DONE, FAILED, RUNNING, WAITING, Member, Outcome, entry_point_of
from dp_lora.tracking.provenance import param_text

STUDIES = ROOT / "runs" / "studies"
RECORD = "member.json"
LOG = "log.txt"  # what the stages of a member print
# the stages that make a member, and their folders; the report reads them by these names. An audit's is named as itself
RESULTS = {name: stage.folder for name, stage in STAGES.items() if stage.noisy and stage.folder}
REQUIRED = tuple(RESULTS)
# sections that do not decide what is fine-tuned: members that differ in these alone share a ledger and an adapter
AFTER = ("experiment", "sampling", "evaluation", "audit", "compute")


@dataclass(frozen=True)
class Record:
    """The content of a member's member.json: the state of its stages."""

    inputs: Mapping[str, str] = field(
        default_factory=dict
    )  # of base and private pictures; the latter's under runs/.key
    seconds: Mapping[str, float] = field(default_factory=dict)  # of each stage that is finished
    runs: Mapping[str, str] = field(default_factory=dict)
    peak_memory: float | None = None
    device: str = ""
    reason: str = ""  # of the last failure: one line that names nothing private

    def with_stage(self, stage: str, seconds: float, run_id: str | None, peak_memory: float | None) -> "Record":
        """This record with one more finished stage."""
        peaks = [peak for peak in (self.peak_memory, peak_memory) if peak is not None]
        return replace(
            self,
            seconds=dict(self.seconds) | {stage: seconds},
            runs=dict(self.runs) | ({stage: run_id} if run_id else {}),
            peak_memory=max(peaks, default=None),
            reason="",
        )


@dataclass(frozen=True)
class Place:
    """A member with its settings and its folder."""

    number: int  # in the order of the study, from 1
    member: Member
    config: Config
    folder: Path

    @property
    def release(self) -> str:
        """Digest of the settings that decide the fine-tuning: members with equal digests share one adapter.

        In the reproducible mode the machine's settings decide too.
        """
        left_out = AFTER[:-1] if self.config.privacy.reproducible else AFTER
        values = {key: param_text(value) for key, value in flatten(self.config).items()}
        kept = {key: text for key, text in values.items() if key.split(".")[0] not in left_out}
        return digest_value(kept | {"seed": values["experiment.seed"]})

    @property
    def log(self) -> Path:
        return self.folder / LOG

    def read(self) -> Record:
        """The member's record; an empty one where there is none."""
        path = self.folder / RECORD
        return Record(**read_json(path)) if path.exists() else Record()

    def write(self, record: Record) -> None:
        """Keep a record, whole, for the operator alone."""
        write_json(self.folder / RECORD, vars(record), private=True)

    def is_done(self, record: Record) -> bool:
        return all(self.has(stage, record) for stage in REQUIRED)

    def has(self, stage: str, record: Record) -> bool:
        """Whether a stage is finished and its result lies there."""
        return stage in record.seconds and (self.folder / RESULTS.get(stage, stage)).is_dir()

    def outcome(self, *, running: bool = False, reason: str = "") -> Outcome:
        """The member as it stands; `reason`: why its process ended, where it could not say so itself."""
        record, compute = self.read(), self.config.compute
        why = record.reason or reason
        state = RUNNING if running else DONE if self.is_done(record) else FAILED if why else WAITING
        return Outcome(
            self.member,
            state,
            self.folder,
            why if state == FAILED else "",
            record.runs,
            _audits_as_one(record.seconds),
            record.peak_memory,
            record.device,
            0 if not record.device or record.device.startswith("cpu") else compute.devices * compute.num_nodes,
        )


def _audits_as_one(seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds by stage, those of all audits together: a report shows what they cost, not each."""
    found: dict[str, float] = {}
    for stage, took in seconds.items():
        name = entry_point_of(stage)
        found[name] = found.get(name, 0.0) + took
    return found


def study_folder(name: str) -> Path:
    """The folder of a study's files, for the operator alone."""
    return STUDIES / name


def places(grid: Grid) -> list[Place]:
    """The members of a study with their folders.

    A folder's name depends on settings and code alone: public, and enough to decide the result. Its record states its
    pictures and base: a name that depended on private pictures would let a run in the store tell of them.
    """
    code = digest_code("commands/finetune.py", "commands/sample.py", "commands/fid.py")
    found = []
    for number, member in enumerate(grid.members, 1):
        config = config_of(member)
        plain = re.sub(r"[^A-Za-z0-9.=,_-]+", "-", member.name)[:80]
        name = f"{plain}-{digest_value([config.experiment.name, identity(config), code])[:8]}"
        found.append(Place(number, member, config, study_folder(grid.name) / name))
    return found
