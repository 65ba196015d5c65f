"""The result of each member of a study: the contract between the runner, which writes it, and the report."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
AUDIT = "audit"  # the first letters of the names of stages that audit: a member may have several


def entry_point_of(stage: str) -> str:
    """The entry point that a stage of a member calls."""
    return AUDIT if stage.startswith(AUDIT) else stage


@dataclass(frozen=True)
class Member:
    """One experiment of a study with one seed."""

    name: str  # what differs from the config, and the seed: "eps=10 lora.rank=8 seed=0"
    config: str
    settings: Mapping[str, str]  # dotted key -> what an override takes, where it differs: {"privacy.eps": "10"}
    seed: int
    group: str = ""  # the comparison that it belongs to, from the study's YAML: "epsilon", "rank", "k"


@dataclass(frozen=True)
class Outcome:
    """A member and its results. Files of `folder` hold scores on private pictures: for the operator alone.

    `folder` holds what the entry points wrote: finetune/ (with release/privacy.json, or not-private/), samples/ (with
    grid.png and samples.json) and evaluation/ (with metrics.json).
    """

    member: Member
    state: str  # WAITING, RUNNING, DONE or FAILED
    folder: Path
    reason: str = ""  # of a failure: one line
    runs: Mapping[str, str] = field(default_factory=dict)  # stage -> MLflow run id
    seconds: Mapping[str, float] = field(default_factory=dict)  # stage -> wall-clock seconds
    peak_memory: float | None = None  # GiB: of the GPU where there is one, else of the process
    device: str = ""  # in plain words: "cpu, 2 threads"
    gpus: int = 0  # that worked on it side by side: GPU hours are these times the hours


@dataclass(frozen=True)
class Study:
    """A study as it stands: its members in the order of its YAML, and what publishing all of them would cost."""

    name: str
    title: str
    outcomes: tuple[Outcome, ...]
    epsilon_of_all: float | None  # of all private releases together; None where no member is private
    delta_of_all: float | None
    audits: tuple[Mapping[str, object], ...] = ()  # lines as runs/audits/EXPERIMENT.jsonl has them
    ui: str = ""  # http(s) address of the pages of runs; empty: no links
    experiment_id: str = ""
