"""The stages as DVC knows them: where each writes, and how to make what is missing."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import click
import yaml

from dp_lora.config import ROOT, Config
from dp_lora.errors import InputError
from dp_lora.files import whole_file
from entrypoints.common import DEFAULT_CONFIG, ENTRY_POINTS, relative

PARAMS = ROOT / "params.yaml"
LETTERS = ROOT / "outputs" / "letters"
PUBLIC_DATA = LETTERS / "data"
AUTOENCODER = LETTERS / "autoencoder"
LDM = LETTERS / "ldm"
RUNS = ROOT / "runs"
WORKING = RUNS / "working"  # unfinished work and caches: outside of every DVC output, safe to delete
STAGES = {PUBLIC_DATA: "prepare_public", AUTOENCODER: "pretrain_ae", LDM: "pretrain_ldm"}


def outputs(config: Config) -> Path:
    """Folder of what the stages of an experiment make."""
    return ROOT / "outputs" / config.experiment.name


def private_data(config: Config) -> Path:
    """The private pictures: below data/ where they were downloaded, else what the stage prepare makes."""
    return ROOT / config.data.folder if config.data.folder is not None else outputs(config) / "data"


def base_folder(config: Config) -> Path:
    """The base model's folder; model.base counts from the project's root."""
    return ROOT / config.model.base


def write_params(values: Mapping[str, str]) -> None:
    """Write params.yaml: `values` of main's parameters, null (as the config says) for the rest."""
    names = ENTRY_POINTS["main"]
    lines = ["# Parameters of `dvc repro`; null means: as the config says."]
    lines += [f"{name}: {_scalar(values.get(name))}" for name in names]
    with whole_file(PARAMS) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _scalar(value: str | None) -> str:
    if value is None:
        return "null"
    return yaml.safe_dump(value, width=10**6).splitlines()[0]


def read_params() -> dict[str, str]:
    """params.yaml as parameters that were typed; InputError for unknown names."""
    try:
        values = yaml.safe_load(PARAMS.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"params.yaml: cannot be read: {' '.join(str(error).split())}") from None
    unknown = set(values) - set(ENTRY_POINTS["main"])
    if unknown:
        raise InputError(
            f"params.yaml: {', '.join(sorted(unknown))}: unknown; there are {', '.join(ENTRY_POINTS['main'])}"
        )
    return {name: str(value) for name, value in values.items() if value is not None}


def dvc(*arguments: str, environment: Mapping[str, str] | None = None) -> None:
    """Run DVC at the project's root with this interpreter; InputError when it fails. Stopped, it stops its stages."""
    command = [sys.executable, "-m", "dvc", *arguments]
    environment = {**os.environ, **(environment or {}), "DP_LORA_PYTHON": sys.executable, "DVC_NO_ANALYTICS": "1"}
    # a session of its own: a signal to this process alone would leave the stage running
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        status = process.wait()
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
    if status:
        raise InputError(f"dvc {' '.join(arguments)}: failed with status {status}; its own lines above say where")


def is_up_to_date() -> bool:
    """Whether `dvc repro` would do nothing."""
    command = [sys.executable, "-m", "dvc", "status", "--json", "dvc.yaml"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.returncode == 0 and found.stdout.strip() == "{}"


@contextmanager
def _parameters(values: Mapping[str, str]) -> Iterator[None]:
    before = PARAMS.read_bytes()
    write_params(values)
    try:
        yield
    finally:
        with whole_file(PARAMS) as temporary:
            temporary.write_bytes(before)


def make_missing(config: Config, typed: Mapping[str, str], environment: Mapping[str, str], *folders: Path) -> None:
    """Make by `dvc repro STAGE` what is missing upstream, and say so; nothing is run where all is there."""
    stages = STAGES | {private_data(config): "prepare"}
    missing = [folder for folder in folders if not folder.exists()]
    if not missing:
        return
    downloads = [folder for folder in missing if folder.is_relative_to(ROOT / "data")]
    if downloads:
        name = relative(downloads[0])
        raise InputError(
            f"{name} missing: `python -m entrypoints.prepare --config {config.experiment.name}` brings it, or "
            f"`dvc pull {name}` where a remote has it"
        )
    unknown = [folder for folder in missing if folder not in stages]
    if unknown:
        raise InputError(f"model.base={config.model.base}: no such folder; make it first, or name another")
    names = [stages[folder] for folder in missing]
    click.echo(f"{', '.join(relative(f) for f in missing)} missing: dvc repro {' '.join(names)}", err=True)
    wanted = {name: typed[name] for name in ("config", "seed", "overrides") if name in typed}
    # stages that DVC starts read params.yaml; it comes back as it was
    with _parameters({"config": DEFAULT_CONFIG, **wanted}):
        dvc("repro", *names, environment=environment)
