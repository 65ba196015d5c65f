"""What a run keeps so that `make reproduce` can make it again: digests of all files, and the state of DVC."""

from pathlib import Path
from typing import TYPE_CHECKING

from dp_lora.config import ROOT, Config
from dp_lora.errors import InputError
from dp_lora.reproduction import manifest
from entrypoints.pipelines import base_folder, outputs, pipeline_of, private_data

if TYPE_CHECKING:
    from dp_lora.tracking import TrackedRun

FILES = "files"  # artifact: the digests
STATE = "state"  # artifact folder: what may differ in a tree that is not dirty


def record(run: "TrackedRun", stage: str, config: Config) -> None:
    """Keep the digests of what the run made and of what lay upstream of it, and the state of DVC.

    Nothing of a config that no pipeline knows: there is no stage that could make it again.
    """
    try:
        pipeline = pipeline_of(config)
    except InputError:
        return
    output = run.output_folder
    folders = {name: folder for name, folder in upstream(stage, config).items() if folder.exists()}
    kept = {name: manifest(folder) for name, folder in folders.items() if folder != output}
    if output is not None and output.exists():
        kept["result"] = manifest(output)
    run.json(kept, FILES)
    for path in (pipeline.params, pipeline.lock, ROOT / "data.dvc"):
        if path.exists():
            run.artifact(path, STATE)


def stage_folders(config: Config) -> dict[str, Path]:
    """What each stage of a config's pipeline makes, in the order of the stages; without what comes from outside."""
    own = outputs(config)
    folders = {stage: ROOT / folder for folder, stage in pipeline_of(config).made.items()}
    if config.data.folder is None:
        folders["prepare"] = private_data(config)
    results = {"finetune": "finetune", "sample": "samples", "fid": "evaluation", "count_params": "count_params"}
    return folders | {stage: own / name for stage, name in results.items()}


def upstream(stage: str, config: Config) -> dict[str, Path]:
    """Folders of the stages before `stage`, by the stage that makes each; what comes from outside is not among them."""
    folders = stage_folders(config)
    public = list(pipeline_of(config).made.values())
    if stage in public:
        before = public[: public.index(stage)]
    else:
        # a base of the user's own is no stage's: its digest is in the result
        before = public if stage != "prepare" and base_folder(config) in folders.values() else []
        if stage in ("finetune", "sample", "fid", "main"):
            before = [*before, "prepare"]
        before = [*before, *{"sample": ["finetune"], "fid": ["finetune", "sample"]}.get(stage, [])]
    return {name: folders[name] for name in before if name in folders}
