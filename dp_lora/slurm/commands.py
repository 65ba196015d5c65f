"""Slurm's own commands, called with lists of words; their errors in one line."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from dp_lora.errors import InputError

PATIENCE = 90.0  # seconds: a client of Slurm itself tries for about a minute where the controller is away
AWAY = re.compile(r"unable to contact slurm controller|connect failure|connection (refused|timed out)", re.IGNORECASE)


class ControllerAway(InputError):
    """The cluster's controller does not answer at this moment: that says nothing about a job."""


def has_slurm() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("scontrol") is not None


def call(program: str, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """What a command of Slurm prints. Raises InputError, one line, if it is missing or refuses; and ControllerAway.

    `environment` is added to this process's own for the command.
    """
    try:
        done = subprocess.run(
            [program, *arguments],
            env=os.environ | (environment or {}) | {"LC_ALL": "C"},
            capture_output=True, text=True, check=False, timeout=PATIENCE, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except FileNotFoundError:
        raise InputError(
            f"{program}: not found; Slurm's commands are needed here: type this on a login node of the cluster"
        ) from None
    except subprocess.TimeoutExpired:
        raise ControllerAway(f"{program}: no answer from Slurm's controller within {PATIENCE:.0f} seconds") from None
    if done.returncode:
        raise _error(program, done.stderr or done.stdout, done.returncode)
    return done.stdout


def _error(program: str, text: str, status: int) -> InputError:
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    said = [line.removeprefix(f"{program}: ").removeprefix("error: ") for line in lines]
    if AWAY.search(text):
        return ControllerAway(f"{program}: Slurm's controller is away; try again when it is back (`scontrol ping`)")
    return InputError(f"{program}: {'; '.join(said)[:300] or f'exit status {status}'}")


def submit(script: Path, *options: str, environment: Mapping[str, str] | None = None) -> str:
    """Send a batch script; returns the job's id. InputError with Slurm's own words where it is refused."""
    told = call("sbatch", "--parsable", *options, str(script), environment=environment)
    # --parsable prints ID, or ID;CLUSTER
    found = re.fullmatch(r"(\d+)(;\S+)?", told.strip().splitlines()[-1] if told.strip() else "")
    if found is None:
        raise InputError(f"sbatch: names no job id, but says: {' '.join(told.split())[:200]}")
    return found[1]


def cancel(job: str) -> None:
    """End a job, also one that waits or was requeued."""
    call("scancel", job)


def cluster_name() -> str:
    """The cluster that this machine's commands speak to: a job's id means nothing on another one."""
    found = re.search(r"^ClusterName\s*=\s*(\S+)", call("scontrol", "show", "config"), flags=re.MULTILINE)
    if found is None:
        raise InputError("scontrol show config: names no cluster")
    return found[1]


def shown_job(job: str) -> str | None:
    """The output of `scontrol show job`, on one line; None if the controller has forgotten the job."""
    try:
        return call("scontrol", "--oneliner", "show", "job", job)
    except ControllerAway:
        raise
    except InputError as error:
        if "Invalid job id" in str(error):
            return None
        raise


def accounted(job: str) -> str | None:
    """State|ExitCode from `sacct`, of a job that the controller has forgotten; None if no database keeps the job."""
    if shutil.which("sacct") is None:
        return None
    try:
        rows = call("sacct", "--allocations", "--noheader", "--parsable2", "--format=State,ExitCode", f"--jobs={job}")
    except InputError:
        # most small clusters have the command, but no database
        return None
    lines: Sequence[str] = [line for line in rows.splitlines() if "|" in line]
    return lines[-1] if lines else None
