"""One member from its fine-tuning to its scores: each stage is the project's own entry point, in its own process."""

import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dp_lora import tracking
from dp_lora.config import ROOT, relative
from dp_lora.errors import InputError
from dp_lora.files import exclusive, private_folder
from dp_lora.study.audits import Audits
from dp_lora.study.grid import Grid, overrides_of
from dp_lora.study.place import RESULTS, Place, Record
from dp_lora.study.result import AUDIT, Member, entry_point_of
from dp_lora.tracking.session import INNER_GRACE, run_in_session

ERROR = "error: "  # prefix of a failed command's one line
PEAKS = ("peak_gpu_memory_gib", "peak_memory_gib")  # metrics of a stage's run, the one that counts first


def study_command(grid: Grid, python: str = sys.executable) -> list[str]:
    """The command of a study, by the interpreter `python`."""
    command = [python, "-m", "dp_lora", "study", "--study", grid.name]
    return [*command, "--overrides", grid.overrides] if grid.overrides else command


def member_command(grid: Grid, number: int, python: str = sys.executable) -> list[str]:
    """The command that makes one whole member of a study, and goes on with one that was stopped.

    Base and pictures have to exist. The command may run on any machine that sees the project's folder.
    """
    return [*study_command(grid, python), "--member", str(number)]


def stage_commands(member: Member, folder: Path, audits: Audits) -> dict[str, list[str]]:
    """The command of each stage of a member, in their order: first its audits, each with settings of its own."""
    paths = {stage: str(folder / name) for stage, name in RESULTS.items()}
    places = {
        "finetune": ["--out", paths["finetune"]],
        "sample": ["--adapter", paths["finetune"], "--out", paths["sample"]],
        "fid": ["--samples", paths["sample"], "--out", paths["fid"]],
    }
    found = {}
    for stage, own in audits.items():
        differs = replace(member, settings=dict(member.settings) | dict(own))
        found[stage] = _command(AUDIT, differs, ["--out", str(folder / stage)])
    return found | {stage: _command(stage, member, words) for stage, words in places.items()}


def _command(entry_point: str, member: Member, words: Sequence[str]) -> list[str]:
    settings = ["--config", member.config, "--overrides", overrides_of(member)]
    return [sys.executable, "-m", "dp_lora", entry_point, *settings, *words]


def run_member(
    place: Place, inputs: Mapping[str, str], run: tracking.TrackedRun, device: str, audits: Audits
) -> Record:
    """Make the missing results of a member and its `audits`, below the MLflow run `run`; gives its record.

    `inputs` identifies the base and the private pictures: results made from others are removed. Raises
    InputError where a stage fails: its line stands in the member's log, and the record says what may be told of it.
    """
    private_folder(place.folder.parent)
    with exclusive(place.folder.with_name(f"{place.folder.name}.lock"), wait=True):
        record = place.read()
        if record.inputs != inputs:
            shutil.rmtree(place.folder, ignore_errors=True)
            record = Record(inputs=inputs)
        private_folder(place.folder)
        record = Record(**vars(record) | {"device": device, "reason": ""})
        place.write(record)
        for stage, command in stage_commands(place.member, place.folder, audits).items():
            if place.has(stage, record):
                continue
            record = _run_stage(place, record, stage, command, run)
            place.write(record)
    return record


def _run_stage(place: Place, record: Record, stage: str, command: Sequence[str], run: tracking.TrackedRun) -> Record:
    began = time.monotonic()
    with place.log.open("ab") as log:
        environment = os.environ | run.environment()
        status = run_in_session(command, ROOT, environment, INNER_GRACE, output=log, tied=True)
    seconds = time.monotonic() - began
    found = tracking.newest_child(run.run_id, entry_point_of(stage))
    if status:
        public = (found["tags"].get("error") if found else None) or f"exit status {status}"
        place.write(Record(**vars(record) | {"reason": f"{stage}: {public}"}))
        said = last_error(place.log) or f"exit status {status}"
        raise InputError(f"{stage}: {said}; {relative(place.log)} has all that it said", f"{stage}: {public}")
    return record.with_stage(stage, seconds, found and found["run_id"], _peak(found["metrics"]) if found else None)


def _peak(metrics: Mapping[str, float]) -> float | None:
    """GiB of a stage's own peak: of the GPU's tensors where there is one, else of the process."""
    for name in PEAKS:
        for key in (name, f"private/{name}"):
            if metrics.get(key):
                return metrics[key]
    return None


def last_error(log: Path) -> str:
    """The text of a log's last error line; empty if there is none."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.removeprefix(ERROR).strip() for line in reversed(lines) if line.startswith(ERROR)), "")
