"""What a run keeps so that `make reproduce` can make it again: digests of all files, and the state of DVC.

This place alone decides it. A tracking store may be another machine, and its runs pass for public where no tag names
what is private: of private pictures, and of what was made from them without a guarantee, a run keeps one digest under
the operator's key, which says nothing to whoever lacks runs/.key and is another one in each run, so that no two of them
tell whether the pictures were the same. No names, no numbers of files or bytes, no plain hash. What it takes to make a
run again beyond that stays on this machine, in runs/operator/RUN_ID.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dp_lora.cli.pipelines import PIPELINES, RUNS, base_folder, outputs, pipeline_of, private_data
from dp_lora.config import ROOT, STAGES, Config, relative
from dp_lora.errors import InputError
from dp_lora.files import private_folder, read_json, whole_file
from dp_lora.operator_key import keyed_digest
from dp_lora.reproduction import digests, manifest

if TYPE_CHECKING:
    from dp_lora.tracking import TrackedRun

FILES = "files"  # artifact: the digests
STATE = "state"  # artifact folder: what may differ in a tree that is not dirty
DATA_DVC = "data.dvc"
LEDGER = "ledger.json"  # of a run's files on this machine: where the working folder of its fine-tuning is
PUBLIC_RESULTS = {stage.folder for stage in STAGES.values() if stage.folder and stage.public}
CODE = ("configs", "dp_lora", "entrypoints", "pipelines")  # what git holds of what stages depend on


def record(run: "TrackedRun", stage: str, config: Config) -> None:
    """Keep the digests of what the run made and of what lay upstream of it, and the state of DVC.

    Nothing of a config that no pipeline knows: there is no stage that could make it again.
    """
    try:
        pipeline = pipeline_of(config)
    except InputError:
        return
    output = run.output_folder
    sign = signature(run.run_id)
    folders = {name: folder for name, folder in upstream(stage, config).items() if folder.exists()}
    kept = {name: _digests(folder, config, sign) for name, folder in folders.items() if folder != output}
    if output is not None and output.exists():
        made_public = stage in pipeline.made.values() or STAGES[stage].public
        kept["result"] = manifest(output) if made_public else _digests(output, config, sign)
    run.json(kept, FILES)
    if pipeline.params.exists():
        run.text(pipeline.params.read_text(encoding="utf-8"), f"{STATE}/{pipeline.params.name}")
    if pipeline.lock.exists():
        lock = yaml.safe_load(pipeline.lock.read_text(encoding="utf-8"))
        run.text(yaml.safe_dump(public_lock(lock), sort_keys=False), f"{STATE}/{pipeline.lock.name}")
    if (ROOT / DATA_DVC).exists():
        # its one hash is of all below data/, private pictures among them
        keep_here(run.run_id, DATA_DVC, (ROOT / DATA_DVC).read_bytes())


def operator_folder(run_id: str) -> Path:
    """Where a run keeps what stays on this machine; there or not."""
    return RUNS / "operator" / run_id


def keep_here(run_id: str, name: str, content: bytes) -> None:
    """Keep a file of a run on this machine, for the operator alone."""
    folder = operator_folder(run_id)
    private_folder(folder.parent)
    private_folder(folder)
    with whole_file(folder / name, private=True) as temporary:
        temporary.write_bytes(content)


def signature(run_id: str) -> Callable[[str], str]:
    """What turns the digest of a private folder into the one that the run keeps."""
    return lambda digest: keyed_digest(RUNS, ["record", run_id, digest])


def is_public(folder: Path) -> bool:
    """Whether a folder depends on private pictures through the mechanism alone; one that is not known does not pass.

    Public are what stages make of public data, and adapters, samples and exports whose own statement says private.
    """
    public = {ROOT / made for pipeline in PIPELINES.values() for made in pipeline.made}
    if folder in public or folder.name in PUBLIC_RESULTS:
        return True
    if not folder.is_dir():
        return False
    if (folder / "privacy.json").is_file():
        return read_json(folder / "privacy.json")["private"] is True
    if (folder / "samples.json").is_file():
        return read_json(folder / "samples.json")["privacy"]["private"] is True
    # what the stage finetune makes: an adapter, and curves of public numbers beside it
    inside = [path for path in folder.iterdir() if path.is_dir()]
    return bool(inside) and all((path / "privacy.json").is_file() and is_public(path) for path in inside)


def _digests(folder: Path, config: Config, sign: Callable[[str], str]) -> dict[str, str]:
    if folder != outputs(config):
        return digests(folder, [] if is_public(folder) else [folder], sign)
    # of `main`: one folder per stage, and the config beside them
    resolved = ROOT / pipeline_of(config).resolved
    return digests(folder, [path for path in folder.iterdir() if path != resolved and not is_public(path)], sign)


def public_lock(lock: Mapping[str, Any]) -> dict[str, Any]:
    """A dvc.lock without hash, size and number of files of what may be private: of that the path alone stays.

    What is not known to be public counts as private; so does what a lock says of params that are in no config.
    """
    stages = {}
    for name, stage in lock.get("stages", {}).items():
        kept = dict(stage)
        for part in ("deps", "outs"):
            if part in stage:
                kept[part] = [
                    entry if _in_public_place(entry["path"]) else {"path": entry["path"]} for entry in stage[part]
                ]
        if "params" in stage:
            configs = {file for p in PIPELINES.values() for file in (p.resolved, relative(p.params), p.params.name)}
            kept["params"] = {file: values for file, values in stage["params"].items() if file in configs}
        stages[name] = kept
    return {**lock, "stages": stages}


def _in_public_place(path: str) -> bool:
    """Whether a path of a dvc.lock is the project's own code and configs, or made of public data alone."""
    if path.split("/", maxsplit=1)[0] in CODE:
        return True
    public = {folder for p in PIPELINES.values() for folder in (*p.made, p.resolved, p.checkpoint, p.public)}
    return path in public or (path.startswith("outputs/") and path.rsplit("/", maxsplit=1)[-1] in PUBLIC_RESULTS)


def stage_folders(config: Config) -> dict[str, Path]:
    """What each stage of a config's pipeline makes, in the order of the stages; without what comes from outside."""
    own = outputs(config)
    folders = {stage: ROOT / folder for folder, stage in pipeline_of(config).made.items()}
    if config.data.folder is None:
        folders["prepare"] = private_data(config)
    return folders | {stage.name: own / stage.folder for stage in STAGES.values() if stage.folder}


def upstream(stage: str, config: Config) -> dict[str, Path]:
    """Folders of the stages before `stage`, by the stage that makes each; what comes from outside is not among them."""
    folders = stage_folders(config)
    public = list(pipeline_of(config).made.values())
    if stage in public:
        before = public[: public.index(stage)]
    else:
        # a base of the user's own is no stage's: its digest is in the result
        before = public if stage != "prepare" and base_folder(config) in folders.values() else []
        before = [*before, *STAGES[stage].before]
    return {name: folders[name] for name in before if name in folders}
