"""A release as an MLflow model: a version of `dp-lora-EXPERIMENT`, found by the alias of its target epsilon (`eps5`).

The model's folder holds the release, the base if that is small, the code that draws, and no pickle. Folder, params and
tags depend on private data through the release alone.
"""

import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dp_lora.config import Config
from dp_lora.config.prompts import drawn_prompts
from dp_lora.files import read_json
from dp_lora.tracking.metrics import number_text
from dp_lora.tracking.provenance import param_text

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

PACKAGE = Path(__file__).resolve().parents[1]
# models-from-code always: MLflow's diffusers flavour needs a base that DiffusionPipeline loads; it loads none of ours
SCRIPT = PACKAGE / "served_model.py"
# only the modules that it needs: each file costs one request to a server
ROOMS = (
    "__init__.py", "errors.py", "files.py", "events.py", "progress.py", "diffusion.py", "grids.py", "team.py",
    "sources.py", "config", "data", "models", "sampling",
)  # fmt: skip
# of a pipeline, with its tokenizers; the digest covers every file of its parts, so none may be left out
PIPELINE_FILES = (".safetensors", ".json", ".txt", ".model", ".md", ".jinja")
REQUIREMENTS = (
    "torch", "diffusers", "peft", "safetensors", "numpy", "pandas", "pyarrow", "pillow", "matplotlib", "omegaconf",
    "PyYAML", "tqdm",
)  # fmt: skip
COPIED_UP_TO = 100 * 10**6  # bytes: a larger base is not put into the model's folder, but named and checked
DESCRIPTION_LENGTH = 5000  # limit of MLflow's column
VERSIONS_TAG = "mlflow.modelVersions"  # the UI follows it from a logged model to the registry


def model_name(experiment: str) -> str:
    """The registered model of an experiment."""
    return f"dp-lora-{experiment}"


def alias_of(eps: float) -> str:
    """The alias of a target epsilon: eps5, eps0_5; MLflow takes letters, digits, - and _ alone."""
    return "eps" + re.sub(r"[^\w-]", "_", number_text(eps))


def register(
    client: "MlflowClient", experiment_id: str, run_id: str, config: Config, release: Path, base: Path
) -> tuple["ModelVersion", str]:
    """Register the release in the folder `release` as a version, and point its alias there; returns version and alias.

    One release is one version: another call for it only moves the alias. Raises the store's errors.
    """
    statement, info = read_json(release / "privacy.json"), read_json(release / "model.json")
    name, alias = model_name(config.experiment.name), alias_of(statement["target_epsilon"])
    facts = {key: param_text(value) for key, value in _facts(statement, info).items()}
    example = {"prompt": drawn_prompts(config)[0]} if _of_prompts(release) else {"class": info["classes"][0]}
    _make_registered_model(client, name, alias, config.experiment.description, example)
    same = f"name = '{name}' and tags.run_id_of_adapter = '{statement['run_id']}'"
    known = client.search_model_versions(same, max_results=1)
    if known:
        made = known[0]
    else:
        model_id = _log(client, experiment_id, run_id, facts, config, release, base)
        tags = {**facts, "run_id_of_adapter": statement["run_id"], "base": info["base"]["path"]}
        source, card = f"models:/{model_id}", _card(release)
        made = client.create_model_version(
            name, source, run_id, tags, description=card, await_creation_for=0, model_id=model_id
        )
        value = json.dumps([{"name": name, "version": made.version}])
        client.set_logged_model_tags(model_id, {VERSIONS_TAG: value})
    if len(statement["parts"]) == 1:  # the alias of a sum would promise less than was spent
        client.set_registered_model_alias(name, alias, made.version)
    return made, alias


def _facts(statement: Mapping[str, Any], info: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "epsilon": statement["epsilon"],
        "delta": statement["delta"],
        "neighbouring_relation": statement["relation"],
        "unit_of_privacy": statement["unit"],
        "rank": info["rank"],
        "k": statement["k"],
    }


def _card(release: Path) -> str:
    """The model card without its YAML head, which the UI would show as text."""
    text = (release / "README.md").read_text(encoding="utf-8")
    return text.split("---\n", 2)[-1].strip()[:DESCRIPTION_LENGTH]


def _of_prompts(release: Path) -> bool:
    """Whether a release draws from prompts: a release of classes has a class embedding."""
    return not (release / "class_embedding.safetensors").exists()


def _make_registered_model(
    client: "MlflowClient", name: str, alias: str, about: str, example: Mapping[str, str]
) -> None:
    from mlflow.exceptions import MlflowException

    row = ", ".join(f"{json.dumps(column)}: [{json.dumps(value)}]" for column, value in example.items())
    description = (
        f"{about}\n\nOne version per release; the alias epsE is the newest with target epsilon E.\n\n```python\n"
        f'model = mlflow.pyfunc.load_model("models:/{name}@{alias}")\n'
        f'images = model.predict(pandas.DataFrame({{{row}}}), params={{"n": 4}})\n```'
    )
    try:
        client.create_registered_model(name, description=description[:DESCRIPTION_LENGTH])
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _log(
    client: "MlflowClient",
    experiment_id: str,
    run_id: str,
    facts: Mapping[str, str],
    config: Config,
    release: Path,
    base: Path,
) -> str:
    """Keep the model's folder in the store, as an output of the run; returns the model's id."""
    from mlflow.entities import LoggedModelOutput

    # not by the flavour's log_model: that copies the run's params and metrics, the private ones too
    model_id = client.create_logged_model(experiment_id, "release", run_id, params=dict(facts)).model_id
    try:
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder) / "model", config, release, base, run_id, model_id)
            client.log_model_artifacts(model_id, str(Path(folder) / "model"))
        client.finalize_logged_model(model_id, "READY")
        client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
    except BaseException:
        with suppress(Exception):
            client.finalize_logged_model(model_id, "FAILED")
        raise
    return model_id


def write_model(folder: Path, config: Config, release: Path, base: Path, run_id: str, model_id: str) -> None:
    """Write the model's folder: MLmodel, environment, served_model.py, code/, artifacts/release, artifacts/base.

    A base above COPIED_UP_TO, or a pipeline with other files than safetensors and text, is left out: model_config names
    its folder as the release does, and loading checks the digest in the release.
    """
    import mlflow.pyfunc
    from mlflow.models import Model

    info, pipeline = read_json(release / "model.json"), (base / "model_index.json").exists()
    files = [path for path in base.rglob("*") if path.is_file()]
    copied = sum(path.stat().st_size for path in files) <= COPIED_UP_TO
    if pipeline:
        copied = copied and all(path.suffix in PIPELINE_FILES for path in files)
    settings: dict[str, Any] = {
        name: getattr(config.sampling, name) for name in ("batch_size", "precision", "attempts")
    }
    if _of_prompts(release):
        settings |= {"size": config.data.size, "negative_prompt": config.sampling.negative_prompt}
    with tempfile.TemporaryDirectory() as staged, warnings.catch_warnings():
        # MLflow warns that it has no example of the input; the signature describes one
        warnings.simplefilter("ignore", UserWarning)
        code, artifacts = Path(staged) / PACKAGE.name, {"release": release}
        code.mkdir()
        for room in (PACKAGE / name for name in ROOMS):
            if room.is_dir():
                shutil.copytree(room, code / room.name, ignore=_all_but(".py"))
            else:
                shutil.copyfile(room, code / room.name)
        if copied:
            artifacts["base"] = Path(staged) / "base"
            kept = PIPELINE_FILES if pipeline else (".safetensors", ".json")
            shutil.copytree(base, artifacts["base"], ignore=_all_but(*kept))
        else:
            settings["base"] = info["base"]["path"]
        model = Model(run_id=run_id, model_id=model_id)
        mlflow.pyfunc.save_model(
            folder,
            mlflow_model=model,
            python_model=SCRIPT,
            code_paths=[str(code)],
            artifacts={name: str(path) for name, path in artifacts.items()},
            signature=_signature(config, _of_prompts(release)),
            # stated, so that MLflow does not load the model in another process to find them
            pip_requirements=[
                f"{name}=={version(name).partition('+')[0]}"
                for name in (*REQUIREMENTS, *(["transformers"] if pipeline else []))
            ],
            model_config=settings,
        )
    # MLflow records where script and artifacts lay on this machine; loading needs their names alone
    flavor = model.flavors[mlflow.pyfunc.FLAVOR_NAME]
    flavor["model_code_path"] = SCRIPT.name
    for artifact in flavor["artifacts"].values():
        artifact["uri"] = artifact["path"]
    model.save(str(folder / "MLmodel"))


def _all_but(*suffixes: str) -> Callable[[str, list[str]], list[str]]:
    """A filter for shutil.copytree that lets it copy files with these suffixes alone."""

    def ignored(folder: str, names: list[str]) -> list[str]:
        kept = (path for path in map(Path(folder).joinpath, names) if path.is_dir() or path.suffix in suffixes)
        return sorted({*names} - {path.name for path in kept if path.name != "__pycache__"})

    return ignored


def _signature(config: Config, of_prompts: bool) -> "ModelSignature":
    """Class names or prompts in, images out; params that decide an image default to the experiment's settings."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec

    sampling, image = config.sampling, (config.data.size, config.data.size, config.data.channels)
    assert sampling.guidance_scale is not None, "the caller puts a pipeline's own in the place of null"
    params = [
        ParamSpec("seed", "long", config.experiment.seed),
        ParamSpec("n", "long", 1),
        ParamSpec("steps", "long", sampling.steps),
        ParamSpec("guidance_scale", "double", float(sampling.guidance_scale)),
        # a pipeline draws by its own scheduler
        *([] if of_prompts else [ParamSpec("eta", "double", float(sampling.eta))]),
    ]
    return ModelSignature(
        Schema([ColSpec("string", "prompt" if of_prompts else "class")]),
        Schema([TensorSpec(np.dtype(np.uint8), (-1, *image))]),
        ParamSchema(params),
    )
