"""Run the pipelines by DVC: write their parameters, make missing folders."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import click
import yaml

from dp_lora.cli.pipelines import Pipeline, from_outside, outside_folders, pipeline_of, private_data, require
from dp_lora.config import ROOT, STAGES, Config, relative
from dp_lora.config.words import did_you_mean
from dp_lora.errors import InputError, SaidError
from dp_lora.files import whole_file
from dp_lora.tracking.session import INNER_GRACE, run_in_session


def write_params(pipeline: Pipeline, values: Mapping[str, str]) -> None:
    """Write a pipeline's params.yaml: `values` of main's parameters, null (as the config says) for the rest."""
    names = STAGES["main"].parameters
    target = "" if pipeline.file == "dvc.yaml" else f" {pipeline.file}"
    lines = [f"# Parameters of `dvc repro{target}`; null means: as the config says."]
    lines += [f"{name}: {_scalar(values.get(name))}" for name in names]
    with whole_file(pipeline.params) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _scalar(value: str | None) -> str:
    if value is None:
        return "null"
    return yaml.safe_dump(value, width=10**6).splitlines()[0]


def read_params(pipeline: Pipeline) -> dict[str, str]:
    """A pipeline's params.yaml as typed parameters; InputError for an unknown name or a missing config."""
    path = relative(pipeline.params)
    try:
        values = yaml.safe_load(pipeline.params.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or values.get("config") is None:
        raise InputError(f"{path}: names no experiment; set config")
    known = STAGES["main"].parameters
    if unknown := set(values) - set(known):
        guess = did_you_mean(min(unknown), known)
        raise InputError(f"{path}: {', '.join(sorted(unknown))}: unknown; there are {', '.join(known)}{guess}")
    return {name: str(value) for name, value in values.items() if value is not None}


def dvc(*arguments: str, environment: Mapping[str, str] | None = None, tied: bool = False) -> None:
    """Run DVC at the project's root with this interpreter. Stopping it stops its stages too.

    If this process is killed, DVC and its stages go on, unless they are `tied` (`start_in_session`). Raises SaidError
    if DVC fails: DVC or the stage has printed the reason.
    """
    command = [sys.executable, "-m", "dp_lora.cli.quiet_dvc", *arguments]
    environment = {**os.environ, **(environment or {}), "DPLORA_PYTHON": sys.executable, "DVC_NO_ANALYTICS": "1"}
    status = run_in_session(command, ROOT, environment, INNER_GRACE, tied=tied)
    if status < 0:
        raise InputError(f"dvc {' '.join(arguments)}: ended by {signal.Signals(-status).name}")
    if status:
        raise SaidError(f"dvc {' '.join(arguments)}: failed with status {status}; the run of its stage says why")


def repro(pipeline: Pipeline, environment: Mapping[str, str]) -> None:
    """`dvc repro` of a whole pipeline."""
    dvc("repro", pipeline.file, environment=environment)


def is_up_to_date(pipeline: Pipeline) -> bool:
    """Whether `dvc repro` of a pipeline would do nothing."""
    return _unchanged(pipeline.file)


def _unchanged(*words: str) -> bool:
    command = [sys.executable, "-m", "dvc", "status", "--json", *words]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        return False
    # `resolve` runs at every `dvc repro` to say what is missing, so "always changed" alone is no change of its inputs
    return all(reasons == ["always changed"] for reasons in json.loads(found.stdout).values())


@contextmanager
def _parameters(pipeline: Pipeline, values: Mapping[str, str]) -> Iterator[None]:
    before = pipeline.params.read_bytes()
    write_params(pipeline, values)
    try:
        yield
    finally:
        with whole_file(pipeline.params) as temporary:
            temporary.write_bytes(before)


def absent(*folders: Path) -> list[Path]:
    """The folders that do not exist."""
    return [folder for folder in folders if not folder.exists()]


def would_make(config: Config, *folders: Path) -> list[str]:
    """The paths that `make_missing` would write for these folders, as a dry run shows them."""
    # no stage makes a folder that comes from outside
    outside = from_outside(config)
    missing = [relative(folder) for folder in absent(*folders) if folder not in outside]
    if not missing:
        return []
    pipeline = pipeline_of(config)
    made = list(pipeline.made)
    # each shared stage needs the shared stages before it
    shared = made[: max((made.index(folder) + 1 for folder in missing if folder in made), default=0)]
    upstream = [folder for folder in shared if not (ROOT / folder).exists()]
    return [pipeline.resolved, relative(pipeline.lock), *upstream, *(name for name in missing if name not in shared)]


def make_missing(config: Config, typed: Mapping[str, str], environment: Mapping[str, str], *folders: Path) -> None:
    """Make missing folders by `dvc repro STAGE`, and say so; run nothing where all of them exist.

    Raises InputError, which says what to type, for a missing folder that comes from outside.
    """
    require(config, folders)
    missing = absent(*folders)
    if not missing:
        return
    targets = " ".join(_targets(config, missing))
    click.echo(f"{', '.join(relative(f) for f in missing)} missing: dvc repro {targets}", err=True)
    bring_up_to_date(config, typed, environment, *missing)


def bring_up_to_date(
    config: Config, typed: Mapping[str, str], environment: Mapping[str, str], *folders: Path, tied: bool = False
) -> None:
    """`dvc repro` of the stages that make `folders`: make missing results, and remake results of other inputs.

    Raises InputError, which says what to type, if these stages need a folder that has to come from outside.
    """
    checkpoint, public, _ = outside_folders(config)
    require(config, [ROOT / folder for folder in (checkpoint, public) if folder is not None])
    # the stages read params.yaml: it is written for them and restored afterwards
    with _parameters(pipeline_of(config), _wanted(config, typed)):
        dvc("repro", *_targets(config, folders), environment=environment, tied=tied)


def are_up_to_date(config: Config, typed: Mapping[str, str], *folders: Path) -> bool:
    """Whether `bring_up_to_date` would make nothing."""
    with _parameters(pipeline_of(config), _wanted(config, typed)):
        return _unchanged("--with-deps", *_targets(config, folders))


def _wanted(config: Config, typed: Mapping[str, str]) -> dict[str, str]:
    known = {name: typed[name] for name in ("config", "seed", "overrides") if name in typed}
    return {"config": config.experiment.name, **known}


def _targets(config: Config, folders: Sequence[Path]) -> list[str]:
    pipeline = pipeline_of(config)
    stages = {ROOT / folder: stage for folder, stage in pipeline.made.items()}
    if config.data.folder is None:
        stages[private_data(config)] = "prepare"
    return [pipeline.target(stages[folder]) for folder in folders]
