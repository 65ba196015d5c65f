"""Make a recorded run again in a work tree of its commit: what its record must hold, and the stages to run."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import click
import yaml

from dp_lora import tracking
from dp_lora.cli.common import relative
from dp_lora.cli.pipelines import RUNS, outputs, pipeline_of
from dp_lora.cli.record import DATA_DVC, FILES, operator_folder, stage_folders, upstream
from dp_lora.config import ROOT, STAGES, Config, flatten, read_resolved
from dp_lora.errors import InputError
from dp_lora.files import digest_file, read_json
from dp_lora.operator_key import KEY
from dp_lora.tracking.session import INNER_GRACE, run_in_session


class Recorded(NamedTuple):
    """How a run was made, according to its record."""

    run_id: str
    stage: str
    commit: str
    lock_digest: str
    config: Config
    files: dict[str, dict[str, str]]
    output: Path
    data_dvc: Path | None

    @property
    def fresh_noise(self) -> bool:
        return STAGES[self.stage].noisy and not self.config.privacy.reproducible


def read_recorded(run_id: str, place: Path) -> Recorded:
    """Read a run's record, its artifacts into `place`; InputError if the record is not enough to make the run again."""
    found = tracking.find_run(run_id)
    tags = found["tags"]

    def refuse(reason: str) -> InputError:
        return InputError(f"{run_id}: cannot be made again: {reason}")

    if found["status"] != "FINISHED":
        raise refuse(f"it is {found['status']}")
    missing = [name for name in ("stage", "mlflow.source.git.commit", "lock_digest", "output") if name not in tags]
    if missing:
        raise refuse(f"{', '.join(missing)} not recorded")
    if tags.get("dirty") != "false":
        raise refuse("its tree was dirty: code that is in no commit")
    commit = tags["mlflow.source.git.commit"]
    if git("cat-file", "-t", commit, check=False).strip() != "commit":
        raise refuse(f"commit {commit} is not in this repository; fetch it")
    lock = subprocess.run(["git", "show", f"{commit}:requirements.lock"], cwd=ROOT, capture_output=True, check=False)
    if hashlib.sha256(lock.stdout).hexdigest() != tags["lock_digest"]:
        raise refuse("its packages were from another lock than its commit's")
    place.mkdir(parents=True, exist_ok=True)
    config = read_resolved(tracking.download(run_id, "config.yaml", place))
    if tags["stage"] not in {*stage_folders(config), "main"}:
        raise refuse(f"stage {tags['stage']} is no stage of {pipeline_of(config).file}")
    if config.privacy.seed_file and STAGES[tags["stage"]].noisy and not (ROOT / config.privacy.seed_file).is_file():
        raise refuse(f"privacy.seed_file={config.privacy.seed_file} is not here; a private run replays only with it")
    files = read_json(tracking.download(run_id, f"{FILES}.json", place))
    if "result" not in files:
        raise refuse("the digests of its result were not recorded")
    data_dvc = operator_folder(run_id) / DATA_DVC
    if any(pipeline_of(config).folders) and not data_dvc.exists():
        raise refuse(f"{relative(data_dvc)} is missing; it stays on the machine that made the run")
    output = ROOT / tags["output"]
    return Recorded(
        run_id,
        tags["stage"],
        commit,
        tags["lock_digest"],
        config,
        files,
        output,
        data_dvc if data_dvc.exists() else None,
    )


def git(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise InputError(f"git {arguments[0]}: {' '.join(done.stderr.split())}")
    return done.stdout


def make_again(recorded: Recorded, tree: Path) -> None:
    """Run a recorded run's stages in `tree`, a work tree of its commit; where noise is fresh, those before it alone."""
    config, pipeline = recorded.config, pipeline_of(recorded.config)
    python = _python(recorded, tree)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "DPLORA_"))}
    # a tree of an older commit reads DP_LORA_PYTHON
    environment |= {"DPLORA_PYTHON": python, "DP_LORA_PYTHON": python, "DVC_NO_ANALYTICS": "1"}

    def run(*command: str) -> None:
        click.echo(f"> {' '.join(command)}", err=True)
        status = run_in_session([python, "-m", *command], tree, environment, INNER_GRACE)
        if status:
            raise InputError(f"{' '.join(command)}: failed in {relative(tree)} with status {status}")

    params = tree / pipeline.params.relative_to(ROOT)
    names = list(yaml.safe_load(params.read_text(encoding="utf-8")))
    values = dict.fromkeys(names) | {"config": config.experiment.name}
    params.write_text(yaml.safe_dump(values), encoding="utf-8")
    run("entrypoints.resolve", "--pipeline", pipeline.name)
    values["overrides"] = " ".join(_differing(_from_nothing(config), read_resolved(tree / pipeline.resolved))) or None
    params.write_text(yaml.safe_dump(values, width=10**6), encoding="utf-8")
    if any(pipeline.folders) and recorded.data_dvc is not None:
        shutil.copyfile(recorded.data_dvc, tree / DATA_DVC)
        # take the data from this repository's cache, else from the remote; then empty the cache, so that stages do run
        run("dvc", "cache", "dir", "--local", str(ROOT / ".dvc" / "cache"))
        run("dvc", "pull", "--allow-missing", "data.dvc")
        run("dvc", "config", "--local", "--unset", "cache.dir")
    seed_file = config.privacy.seed_file
    if seed_file and not Path(seed_file).is_absolute():
        (tree / seed_file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / seed_file, tree / seed_file)
    if seed_file:
        _copy_replays(tree)
    targets = list(_targets(recorded))
    if targets:
        run("dvc", "repro", *targets)


def _copy_replays(tree: Path) -> None:
    """Copy replays' ledgers into the tree: they hold each sum's digest, so that no noise is added to a second sum."""
    for ledger in sorted(RUNS.glob("*/ledger.jsonl")):
        if b'"randomness": "replay"' in ledger.read_bytes():
            folder = tree / RUNS.name / ledger.parent.name
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("plan.json", ledger.name):
                shutil.copy2(ledger.parent / name, folder / name)
    if (RUNS / KEY).exists():
        (tree / RUNS.name).mkdir(exist_ok=True)
        shutil.copy2(RUNS / KEY, tree / RUNS.name / KEY)


def _python(recorded: Recorded, tree: Path) -> str:
    """This interpreter where its packages are from the run's lock, else one that `make setup` makes in the tree."""
    if digest_file(ROOT / "requirements.lock") == recorded.lock_digest:
        return sys.executable
    if run_in_session(["make", "setup"], tree, os.environ, INNER_GRACE):
        raise InputError(f"make setup: failed in {relative(tree)}; its own lines above say why")
    return str(tree / ".venv" / "bin" / "python")


def _from_nothing(config: Config) -> Config:
    """The config for another tree, which has neither this tree's unfinished work nor its store's run ids."""
    parent = config.privacy.parent
    if parent is not None:
        parent = str(tracking.resolve_input(parent, "privacy.parent").resolve())
    return replace(config, privacy=replace(config.privacy, parent=parent), train=replace(config.train, resume="auto"))


def _differing(config: Config, plain: Config) -> Iterator[str]:
    """Overrides that turn the experiment's file into the config that the run resolved."""
    from dp_lora.tracking.provenance import override_text

    before = flatten(plain)
    for key, value in flatten(config).items():
        if before[key] != value:
            yield f"{key}={override_text(value)}"


def _targets(recorded: Recorded) -> Iterator[str]:
    pipeline = pipeline_of(recorded.config)
    if not recorded.fresh_noise:
        yield pipeline.file if recorded.stage == "main" else pipeline.target(_dvc_stage(recorded))
        return
    for stage in upstream("finetune", recorded.config):
        yield pipeline.target(stage)


def _dvc_stage(recorded: Recorded) -> str:
    """The run's DVC stage; `prepare` stands for two of them, and the run's output tells which."""
    public = stage_folders(recorded.config).get("prepare_public")
    return "prepare_public" if recorded.stage == "prepare" and recorded.output == public else recorded.stage


def result_folder(recorded: Recorded) -> Path:
    """The folder that DVC's stage writes in place of the run's `output`."""
    if recorded.stage == "main":
        return outputs(recorded.config)
    folder = stage_folders(recorded.config)[_dvc_stage(recorded)]
    return folder / recorded.output.name if recorded.stage == "finetune" else folder
