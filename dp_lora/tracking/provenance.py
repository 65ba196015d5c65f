"""A run's origin: the code's commit, the config as params, the hashes of inputs as DVC computes them."""

import hashlib
import json
import os
import re
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from dp_lora.config import ROOT, STAGES, Config
from dp_lora.errors import InputError
from dp_lora.files import digest_file, read_json
from dp_lora.tracking.metrics import number_text

# DVC and its users change these files from run to run: they are not code
NOT_CODE = {"dvc.lock", "data.dvc", "params.yaml"}


def git_tags(root: Path = ROOT) -> dict[str, str]:
    """The commit, and whether a tracked file other than dvc.lock, data.dvc and params.yaml differs from it.

    Empty where `root` is no git repository or git is missing.
    """

    def git(*arguments: str) -> str:
        # no lock on the index: the user may be committing at this moment
        environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    try:
        commit = git("rev-parse", "HEAD").strip()
        status = git("status", "--porcelain", "-z", "--untracked-files=no", "--no-renames")
    except (OSError, subprocess.CalledProcessError):
        return {}
    changed = {Path(entry[3:]).name for entry in status.split("\0") if entry}
    return {"mlflow.source.git.commit": commit, "dirty": str(bool(changed - NOT_CODE)).lower()}


def environment_tags() -> dict[str, str]:
    """SHA-256 of the lock that the packages were installed from and, in a container, the image's digest.

    The image's DPLORA_LOCK names the lock that it was built from; docker/run_arguments.py gives DPLORA_IMAGE.
    Raises InputError in an image older than this code: it was not built from the project's lock.
    """
    if "DP_LORA_LOCK" in os.environ:
        raise InputError("DP_LORA_LOCK: set by an image that is older than this code; build it anew: make image")
    tags = {}
    with suppress(OSError):
        tags["lock_digest"] = digest_file(Path(os.environ.get("DPLORA_LOCK") or ROOT / "requirements.lock"))
    if image := os.environ.get("DPLORA_IMAGE"):
        tags["image_digest"] = image
    return tags


def run_name(stage: str, config: Config, nested: bool = False) -> str:
    """`mnist5k eps=5 r=4 k=1` for a stage that concerns the private fine-tuning, else `mnist5k pretrain_ldm`.

    A fine-tuning `nested` below a run of `main` adds `finetune`: `main` has the shorter name.
    """
    if not STAGES[stage].named_by_privacy:
        return f"{config.experiment.name} {stage}"
    name = f"{config.experiment.name} eps={number_text(config.privacy.eps)} r={config.lora.rank} k={config.privacy.k}"
    if config.privacy.accounting != "per_unit":
        name += f" accounting={config.privacy.accounting}"  # so that nobody takes its epsilon for a guarantee
    return name if stage == "main" or (stage == "finetune" and not nested) else f"{name} {stage}"


def override_text(value: Any) -> str:
    """A config leaf as an override takes it: `param_text`, quoted if a part of it would be misread."""
    quoted = isinstance(value, str) and re.search(r"[\s'\"\[\]{}]", value)
    return json.dumps(value, ensure_ascii=False) if quoted else param_text(value)


def param_text(value: Any) -> str:
    """A config leaf as text: true, null, [1,2], 1e-05, inf."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def dvc_hash(path: Path) -> str:
    """The hash under which DVC (version 3) records a file or folder, computed from its present content.

    Not read from dvc.lock: while a stage runs, that holds the hashes of the run before.
    """
    if path.is_file():
        return _md5(path)
    files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    entries = [{"md5": _md5(files[name]), "relpath": name} for name in sorted(files)]
    listing = json.dumps(entries, sort_keys=True).encode()
    return hashlib.md5(listing, usedforsecurity=False).hexdigest() + ".dir"


def origin_tags(path: Path, *, private: bool = False) -> dict[str, str]:
    """The origin, revision or url in a folder's source.json, and the sha256 of public data; empty without that file."""
    try:
        facts = read_json(path / "source.json")
        names = ("origin", "revision", "url", *(() if private else ("sha256",)))
        return {name: str(facts[name]) for name in names if name in facts}
    except (OSError, ValueError, TypeError):
        return {}


def is_in_dvc(path: Path) -> bool:
    """Whether DVC keeps `path`: downloads lie in data/, results of stages in outputs/."""
    absolute = Path(os.path.abspath(path))
    return any(absolute.is_relative_to(ROOT / folder) for folder in ("data", "outputs"))
