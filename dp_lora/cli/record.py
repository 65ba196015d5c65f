"""Keep in a run the digests of its files and the state of DVC, so that `make reproduce` can make it again.

No other module decides what a run keeps. The tracking store may be on another machine, and people share runs.
So for private pictures, and for files made from them without a guarantee, a run keeps one digest under the operator's
key (runs/.key): it tells nothing to anybody without the key, and it differs in each run, so that two runs do not show
whether their pictures were the same. A run keeps no names, no numbers of files or bytes, and no plain hashes of
them. All else that is needed to make a run again stays on this machine, in runs/operator/RUN_ID.
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
STATE = "state"  # artifact folder: files that may differ although the tree is not dirty
DATA_DVC = "data.dvc"
LEDGER = "ledger.json"  # in runs/operator/RUN_ID: names the working folder of the run's fine-tuning
PUBLIC_RESULTS = {stage.folder for stage in STAGES.values() if stage.folder and stage.public}
CODE = ("configs", "dp_lora", "entrypoints", "pipelines")  # the code and configs in git that stages depend on


def record(run: "TrackedRun", stage: str, config: Config) -> None:
    """Keep the digests of the run's result and of the folders upstream of it, and the state of DVC.

    Keeps nothing for a config without a pipeline: no stage could make its result again.
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
        # its one hash covers all of data/, private pictures included
        keep_here(run.run_id, DATA_DVC, (ROOT / DATA_DVC).read_bytes())


def operator_folder(run_id: str) -> Path:
    """Folder of a run's files that stay on this machine; it may not exist."""
    return RUNS / "operator" / run_id


def keep_here(run_id: str, name: str, content: bytes) -> None:
    """Keep a file of a run on this machine, for the operator alone."""
    folder = operator_folder(run_id)
    private_folder(folder.parent)
    private_folder(folder)
    with whole_file(folder / name, private=True) as temporary:
        temporary.write_bytes(content)


def signature(run_id: str) -> Callable[[str], str]:
    """The function that turns a private folder's digest into the keyed digest that the run keeps."""
    return lambda digest: keyed_digest(RUNS, ["record", run_id, digest])


def is_public(folder: Path) -> bool:
    """Whether a folder depends on private pictures through the mechanism alone; False for an unknown folder.

    Stages' results of public data are public, and so are adapters, samples and exports with a statement of privacy.
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
    # the stage finetune makes an adapter, and curves of public numbers beside it
    inside = [path for path in folder.iterdir() if path.is_dir()]
    return bool(inside) and all((path / "privacy.json").is_file() and is_public(path) for path in inside)


def _digests(folder: Path, config: Config, sign: Callable[[str], str]) -> dict[str, str]:
    if folder != outputs(config):
        return digests(folder, [] if is_public(folder) else [folder], sign)
    # the result of `main`: one folder per stage, and the config beside them
    resolved = ROOT / pipeline_of(config).resolved
    return digests(folder, [path for path in folder.iterdir() if path != resolved and not is_public(path)], sign)


def public_lock(lock: Mapping[str, Any]) -> dict[str, Any]:
    """A dvc.lock that gives only the path, not hash, size or number of files, of each folder that may be private.

    A folder counts as private unless it is known to be public. Params of files that are not configs are private too.
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
    """Whether a path of a dvc.lock is the project's own code or config, or was made from public data alone."""
    if path.split("/", maxsplit=1)[0] in CODE:
        return True
    public = {folder for p in PIPELINES.values() for folder in (*p.made, p.resolved, p.checkpoint, p.public)}
    return path in public or (path.startswith("outputs/") and path.rsplit("/", maxsplit=1)[-1] in PUBLIC_RESULTS)


def stage_folders(config: Config) -> dict[str, Path]:
    """The folder that each stage of a config's pipeline makes, in stage order, without folders from outside."""
    own = outputs(config)
    folders = {stage: ROOT / folder for folder, stage in pipeline_of(config).made.items()}
    if config.data.folder is None:
        folders["prepare"] = private_data(config)
    return folders | {stage.name: own / stage.folder for stage in STAGES.values() if stage.folder}


def upstream(stage: str, config: Config) -> dict[str, Path]:
    """Folders of the stages before `stage`, by the stage that makes each, without folders from outside."""
    folders = stage_folders(config)
    public = list(pipeline_of(config).made.values())
    if stage in public:
        before = public[: public.index(stage)]
    else:
        # no stage makes a user-supplied base; its digest is stored with the result
        before = public if stage != "prepare" and base_folder(config) in folders.values() else []
        before = [*before, *STAGES[stage].before]
    return {name: folders[name] for name in before if name in folders}
