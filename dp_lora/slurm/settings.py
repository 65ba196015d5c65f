"""A site's settings: the backend config of `-b slurm`, each value checked before anything is made or sent.

A value that reaches a batch script may hold only characters that neither a shell nor a line of #SBATCH interprets.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from dp_lora.config.schema import Compute
from dp_lora.config.words import did_you_mean
from dp_lora.errors import InputError

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,+-]*")
CONSTRAINT = re.compile(r"[A-Za-z0-9_.,+*&|()\[\]-]+")
GPUS = re.compile(r"([A-Za-z][A-Za-z0-9_.-]*:)?[1-9][0-9]*")
MEMORY = re.compile(r"[1-9][0-9]*[KMGT]?")
TIME = re.compile(r"[0-9]+(:[0-5][0-9]){0,2}|[0-9]+-[0-9]{1,2}(:[0-5][0-9]){0,2}")
EXTRA = re.compile(r"--([a-z][a-z0-9-]*)(=[A-Za-z0-9_.,:;/@%+*&|()\[\]=-]+)?")
IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/@-]*")
FILL_IN = "FILL_IN"  # stands in a template where only the site can say what
ENVIRONMENTS = ("venv", "docker", "apptainer")
# options that the backend itself sets, or that would replace the script
OURS = {
    "account", "array", "chdir", "comment", "constraint", "cpus-per-task", "error", "export",
    "export-file", "gres", "gpus", "gpus-per-node", "help", "input", "job-name", "mem", "no-requeue", "nodes", "ntasks",
    "ntasks-per-node", "open-mode", "output", "parsable", "partition", "requeue", "signal", "test-only", "time",
    "usage", "version", "wait", "wrap",
}  # fmt: skip


@dataclass(frozen=True)
class Environment:
    """Where the entry point's Python is: a virtual environment on the shared disk, or an image."""

    kind: Literal["venv", "docker", "apptainer"]
    value: str


@dataclass(frozen=True)
class Settings:
    """A backend config; null: the site's own default."""

    environment: Environment
    partition: str | None = None
    account: str | None = None
    gpus: str | None = None  # per machine: a number, or TYPE:NUMBER
    cpus: int | None = None  # of each rank
    memory: str | None = None  # of each machine
    time: str | None = None
    constraint: str | None = None
    extra: tuple[str, ...] = ()
    wait: bool = True
    on_interrupt: Literal["cancel", "leave"] = "cancel"
    signal: int = 120  # seconds before the time limit, for the entry point to save what it can
    requeue: bool = True

    @property
    def gpu_count(self) -> int:
        """GPUs of each machine."""
        return int(self.gpus.rpartition(":")[2]) if self.gpus else 0


def require_gpus(settings: Settings, compute: Compute) -> None:
    """Raise InputError for an experiment that needs more GPUs per machine than its job has."""
    if settings.gpus and compute.device != "cpu" and compute.devices > settings.gpu_count:
        raise InputError(
            f"compute.devices={compute.devices}, compute.num_nodes={compute.num_nodes}: the backend config asks for "
            f"{settings.gpu_count} GPUs a machine; set gpus so"
        )


KEYS = tuple(field.name for field in fields(Settings))


def read_settings(given: Mapping[str, Any], venv: Path) -> Settings:
    """The settings in a backend config; `venv` is used if it names no environment. InputError, one line each."""
    for key in given:
        if key not in KEYS:
            raise InputError(f"backend config: no key {_shown(key)}{did_you_mean(str(key), KEYS)}")
    values = {key: value for key, value in given.items() if value is not None}
    texts = {
        key: _text(key, values[key], pattern, example)
        for key, pattern, example in (
            ("partition", NAME, "gpu"),
            ("account", NAME, "project1"),
            ("gpus", GPUS, '2 or "a100:2"'),
            ("memory", MEMORY, "64G"),
            ("time", TIME, "12:00:00 or 2-00:00:00"),
            ("constraint", CONSTRAINT, "a100|h100"),
        )
        if key in values
    }
    return Settings(
        environment=_environment(values.get("environment"), venv),
        **texts,
        cpus=_number("cpus", values["cpus"], 1, 4096) if "cpus" in values else None,
        extra=_extra(values.get("extra", [])),
        wait=_flag("wait", values.get("wait", True)),
        requeue=_flag("requeue", values.get("requeue", True)),
        on_interrupt=_choice("on_interrupt", values.get("on_interrupt", "cancel")),
        signal=_number("signal", values.get("signal", 120), 10, 65535),
    )


def _shown(value: Any) -> str:
    return repr(value)[:100]


def _text(key: str, value: Any, pattern: re.Pattern[str], example: str) -> str:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if text == FILL_IN:
        raise InputError(
            f"backend config: {key}={FILL_IN}: write your site's, such as {example}; null takes the site's default"
        )
    if not isinstance(text, str) or not pattern.fullmatch(text):
        raise InputError(f"backend config: {key}={_shown(value)}: write it as {example}")
    return text


def _number(key: str, value: Any, least: int, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise InputError(f"backend config: {key}={_shown(value)}: must be a whole number from {least} to {most}")
    return value


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"backend config: {key}={_shown(value)}: must be true or false")
    return value


def _choice(key: str, value: Any) -> Literal["cancel", "leave"]:
    if value not in ("cancel", "leave"):
        raise InputError(f"backend config: {key}={_shown(value)}: must be cancel or leave")
    return value


def _extra(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise InputError(f'backend config: extra={_shown(value)}: must be a list such as ["--qos=long"]')
    for line in value:
        found = EXTRA.fullmatch(line) if isinstance(line, str) else None
        if found is None:
            raise InputError(
                f"backend config: extra: {_shown(line)}: write it as --NAME=VALUE, without blanks or quotes"
            )
        if found[1] in OURS:
            raise InputError(
                f"backend config: extra: --{found[1]} is set by its own key, or by the backend; leave it out"
            )
    return tuple(value)


def _environment(value: Any, venv: Path) -> Environment:
    if value is None:
        return Environment("venv", str(venv))
    if not isinstance(value, Mapping) or len(value) != 1:
        raise InputError(
            f"backend config: environment={_shown(value)}: must have one of {', '.join(ENVIRONMENTS)}, such as "
            '{"venv": "/shared/dp-lora/.venv"}'
        )
    ((kind, place),) = value.items()
    if kind not in ENVIRONMENTS:
        raise InputError(f"backend config: environment: no kind {_shown(kind)}{did_you_mean(str(kind), ENVIRONMENTS)}")
    if not isinstance(place, str) or not place or not place.isprintable():
        raise InputError(f"backend config: environment.{kind}={_shown(place)}: must be a path or a name")
    if kind == "docker":
        if not IMAGE.fullmatch(place):
            raise InputError(f"backend config: environment.docker={_shown(place)}: must be an image's name")
    else:
        if not Path(place).is_absolute() or ":" in place:
            raise InputError(
                f"backend config: environment.{kind}={_shown(place)}: must be an absolute path without colons"
            )
        needed = Path(place) / "bin/python" if kind == "venv" else Path(place)
        if not needed.exists():
            raise InputError(f"backend config: environment.{kind}={_shown(place)}: there is no {needed}")
    return Environment(kind, place)
