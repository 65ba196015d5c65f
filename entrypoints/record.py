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


def upstream(stage: str, config: Config) -> dict[str, Path]:
    """Folders of the stages before `stage`, by the stage that makes each; what comes from outside is not among them."""
    pipeline = pipeline_of(config)
    public = {made: ROOT / folder for folder, made in pipeline.made.items()}
    order = list(public)
    if stage in order:
        return {name: public[name] for name in order[: order.index(stage)]}
    found = {name: folder for name, folder in public.items() if stage != "prepare"}
    if base_folder(config) not in found.values():
        found = {}  # a base of the user's own: its digest is in the result
    if config.data.folder is None and stage in ("finetune", "sample", "fid", "main"):
        found["prepare"] = private_data(config)
    own = outputs(config)
    if stage in ("sample", "fid"):
        found["finetune"] = own / "finetune"
    if stage == "fid":
        found["sample"] = own / "samples"
    return found
