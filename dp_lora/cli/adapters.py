"""Find the adapter and the base model that a command works on, and record both in the command's run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dp_lora import tracking
from dp_lora.cli.common import Call, relative, track_privacy
from dp_lora.cli.pipelines import base_folder, outputs
from dp_lora.config import ROOT, Config
from dp_lora.errors import InputError
from dp_lora.statement import read_privacy


def adapter_folder(call: Call) -> Path:
    """The adapter named by `adapter` (path or run id); if empty, the output of the experiment's finetune stage."""
    if named := call.inputs.get("adapter"):
        return find_adapter(named, "adapter")
    folder = outputs(call.config) / "finetune"
    return _adapter_in(folder, f"adapter={relative(folder)}")


def find_adapter(named: str, key: str) -> Path:
    """The folder of the adapter that a path or run id names; `key` is the parameter's name in errors.

    Raises InputError for a folder without an adapter, and for a folder in which a later run has replaced the named
    run's adapter: the new adapter has another privacy.
    """
    folder = _adapter_in(tracking.resolve_input(named, key), f"{key}={named}")
    if tracking.existing_path(named) is None:
        made = tracking.find_run(named, key)["tags"].get("run_id_of_adapter")
        if made not in (None, read_privacy(folder)["run_id"]):
            raise InputError(
                f"{key}={named}: {relative(folder)} holds another run's adapter by now; name a folder that holds this "
                f"run's, or the run that made that one"
            )
    return folder


def _adapter_in(folder: Path, shown: str) -> Path:
    for candidate in (folder, folder / "release", folder / "not-private"):
        if (candidate / "privacy.json").exists():
            return candidate
    raise InputError(
        f"{shown}: holds no adapter; name a release/ or not-private/ folder, or the run id of a finetune run, or "
        "run `dvc repro finetune`"
    )


def adapter_of_samples(facts: Mapping[str, Any], key: str) -> Path:
    """The adapter that drew the samples; `facts`: content of their samples.json; `key`: the setting that needs it.

    Raises InputError if the adapter is gone or another one lies in its place.
    """
    folder = ROOT / facts["adapter"]
    if not (folder / "privacy.json").exists() or read_privacy(folder)["run_id"] != facts["privacy"]["run_id"]:
        raise InputError(
            f"{key}: {facts['adapter']}, which drew the samples, is gone or holds another run's adapter by now; draw "
            "samples anew"
        )
    return folder


def track_adapter(
    run: tracking.TrackedRun, adapter: Path, info: Mapping[str, Any], statement: Mapping[str, Any], config: Config
) -> None:
    """Record in a run which adapter it works on, with the adapter's privacy, and link the fine-tuning that made it."""
    run.dataset("adapter", adapter, context="adapter", private=not statement["private"])
    run.tags({"adapter": relative(adapter), "base": info["base"]["path"]})
    track_privacy(run, statement, config)
    run.made_from("adapter", nest=True, stage="finetune", run_id_of_adapter=statement["run_id"])


def find_base(named: Mapping[str, str], config: Config, whose: str) -> Path:
    """The folder of the base model with this digest: the named path, else model.base; InputError if neither has it."""
    from dp_lora.models.info import model_digest

    for folder in (ROOT / named["path"], base_folder(config)):
        if folder.exists() and model_digest(folder) == named["digest"]:
            return folder
    raise InputError(f"{whose}: its base {named['path']} is missing or another one; restore it, or set model.base")


def track_base(run: tracking.TrackedRun, base: Path, digest: str) -> None:
    """Record the base model with this digest as an input of a run."""
    run.dataset("base", base, digest, context="base model")
