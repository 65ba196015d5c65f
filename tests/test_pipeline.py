"""The DVC pipelines: each parameter reruns the right stages, and every config key is a dependency of a stage."""

import re
import subprocess
import sys

import pytest
import yaml

from dp_lora.cli.pipelines import (
    PIPELINES,
    autoencoder_folder,
    from_outside,
    outside_folders,
    pipeline_of,
    private_data,
    public_data,
    require,
    require_distance,
)
from dp_lora.config import ROOT, STAGES, flatten, load
from dp_lora.errors import InputError
from dp_lora.sources import PACKAGE, shown, sources
from dp_lora.training.step_code import PRIVATE_STEP
from tests.stage_code import code_of, is_code

FILES = {
    name: yaml.safe_load((ROOT / pipeline.file).read_text(encoding="utf-8")) for name, pipeline in PIPELINES.items()
}
# no result depends on these: names, downloads of `prepare` (DVC knows data/ by its hash), the division of the work
DOWNLOAD = ("checkpoint.url", "checkpoint.max_size")
NOT_RESULTS = (
    "experiment.name",
    "experiment.description",
    *DOWNLOAD,
    "compute.device",
    "compute.num_nodes",
    "compute.rank_timeout_minutes",
    "compute.checkpointing",
    "compute.captions",
    "compute.physical_batch_size",
    "audit.",  # an audit is a separate call; a release names the audits of its step
)
# one experiment of each pipeline
GIVEN = f"data.path=pictures data.n_public=4000 model.base=someone/base model.revision={'ab' * 20} sampling.prompts=x"
EXPERIMENTS = {
    "letters": ("mnist5k", ""),
    "celebahq": ("celebahq-eps10", ""),
    "emnist": ("mnist32-class-dp-eps10", ""),
    "diffusers": ("text2image", GIVEN),
    "emoji": ("emoji", ""),
}
each_pipeline = pytest.mark.parametrize("name", PIPELINES)


def outs_of(stage: dict) -> list[str]:
    """Paths of a stage's outputs; an output may have settings or none."""
    return [path for out in stage["outs"] for path in ([out] if isinstance(out, str) else out)]


def config_of(name: str):
    config, overrides = EXPERIMENTS[name]
    return load(config, {}, overrides)


def keys_of(name: str, stage: str) -> list[str]:
    """Sections or keys of the resolved config that a stage lists under params."""
    listed = FILES[name]["stages"][stage].get("params", [])
    resolved = PIPELINES[name].resolved
    return [key for item in listed if isinstance(item, dict) for key in item.get(resolved, [])]


def depends(name: str, stage: str, leaf: str) -> bool:
    return any(leaf == key or leaf.startswith(f"{key}.") for key in keys_of(name, stage))


def stages_of(name: str, leaf: str) -> set[str]:
    return {stage for stage in FILES[name]["stages"] if depends(name, stage, leaf)}


@each_pipeline
@pytest.mark.parametrize("parameter", ["eps", "delta", "k", "max_grad_norm", "batch_size", "epochs", "lr"])
def test_a_privacy_parameter_reruns_finetune_and_nothing_before(name, parameter):
    values = {"eps": "1", "delta": "1e-6", "k": "2", "max_grad_norm": "0.1", "batch_size": "200"}
    values |= {"epochs": "5", "lr": "0.01"}
    before, after = flatten(load("mnist5k")), flatten(load("mnist5k", {parameter: values[parameter]}))
    changed = [key for key in before if before[key] != after[key]]
    assert len(changed) == 1
    assert stages_of(name, changed[0]) == {"finetune"}


@each_pipeline
def test_every_stage_depends_on_the_code_that_it_runs_by_its_imports(name):
    for stage_name, stage in FILES[name]["stages"].items():
        if not stage.get("always_changed"):
            listed = [dependency for dependency in stage["deps"] if is_code(dependency)]
            assert listed == code_of(stage["cmd"]), f"{stage_name}: `python -m tests.stage_code` writes what is right"


def test_all_code_of_the_private_step_is_a_dependency_of_finetune():
    private = {shown(path) for path in sources(*(PACKAGE / name for name in PRIVATE_STEP))}
    finetune = {shown(path) for path in sources(ROOT / "entrypoints/finetune.py")}
    assert private <= finetune
    assert {"dp_lora/models/autoencoder.py", "dp_lora/data/latents.py", "dp_lora/privacy/step.py"} <= private


def test_bytecode_beside_the_code_is_no_dependency():
    command = [sys.executable, "-m", "dvc", "check-ignore", "dp_lora/privacy/__pycache__/step.cpython-313.pyc"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_every_leaf_of_the_config_is_a_dependency_of_some_stage():
    for leaf in flatten(load("mnist5k")):
        if not leaf.startswith(NOT_RESULTS):
            assert any(stages_of(name, leaf) for name in PIPELINES), leaf


@each_pipeline
def test_every_listed_key_exists(name):
    leaves = set(flatten(load("mnist5k")))
    for stage in FILES[name]["stages"]:
        for key in keys_of(name, stage):
            assert any(leaf == key or leaf.startswith(f"{key}.") for leaf in leaves), f"{stage}: {key}"


@each_pipeline
def test_plan_ledger_checkpoints_and_what_comes_from_outside_lie_outside_every_output(name):
    outs = [out for stage in FILES[name]["stages"].values() for out in outs_of(stage)]
    assert outs
    assert all(out.startswith("outputs/") for out in outs)


@each_pipeline
def test_every_stage_runs_an_entry_point_at_the_root_without_a_shell_s_help(name):
    for stage_name, stage in FILES[name]["stages"].items():
        words = stage["cmd"].split()
        assert words[0] == "entrypoints/run"
        if stage_name != "import_base":
            assert (ROOT / "entrypoints" / f"{words[1]}.py").exists(), stage_name
        assert not re.search(r"[;&|<>`]|\$\(", stage["cmd"])
        folder = (ROOT / PIPELINES[name].file).parent
        assert (folder / stage.get("wdir", ".")).resolve() == ROOT


@each_pipeline
def test_every_dependency_is_code_that_exists_another_stage_s_output_or_a_folder_of_the_table(name):
    stages = FILES[name]["stages"]
    outs = {out for stage in stages.values() for out in outs_of(stage)}
    outside = {folder for folder in PIPELINES[name].folders if folder is not None}
    used = {dependency for stage in stages.values() for dependency in stage.get("deps", [])}
    assert outside == {dependency for dependency in used if dependency.startswith("data/")}
    for dependency in used - outside - outs:
        assert not dependency.startswith("outputs/"), dependency
        assert (ROOT / dependency).exists(), dependency


def test_prepared_private_pictures_are_in_no_cache_remote_or_run_cache_and_each_repro_looks_at_their_folder():
    for name, folder in (("letters", "outputs/${config}/data"), ("diffusers", "outputs/diffusers/${config}/data")):
        stages = FILES[name]["stages"]
        # with `cache: false` DVC stores no copy of an output; with `persist: true` it takes none from the run cache
        assert stages["prepare"]["outs"] == [{folder: {"cache": False, "persist": True}}]
        assert stages["resolve"]["always_changed"]


def test_one_config_has_other_folders_on_a_given_base_so_that_no_two_stages_make_one_folder(tmp_path, monkeypatch):
    from dp_lora.cli import pipelines

    monkeypatch.setattr(pipelines, "ROOT", tmp_path)
    config = load("folder", {}, "data.path=pictures data.classes=[a] data.n_public=4000 model.base=mine")
    assert private_data(config) == tmp_path / "outputs/folder/data"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/model_index.json").write_text("{}")
    assert private_data(config) == tmp_path / "outputs/diffusers/folder/data"
    assert pipeline_of(config) is PIPELINES["diffusers"]
    with pytest.raises(InputError, match="autoencoder of its own; nothing is pretrained"):
        autoencoder_folder(config)


@each_pipeline
def test_the_table_and_dvc_yaml_name_the_same_stages_and_folders(name):
    pipeline, stages = PIPELINES[name], FILES[name]["stages"]
    assert stages["resolve"]["outs"] == [pipeline.resolved]
    for folder, stage in pipeline.made.items():
        assert stages[stage]["outs"] == [folder]
    base = list(pipeline.made)[-1]
    for stage in ("count_params", "finetune", "sample", "fid"):
        assert base in stages[stage]["deps"]
        assert pipeline.resolved in stages[stage]["cmd"]


def test_the_pipelines_differ_in_nothing_but_where_data_and_base_come_from():
    for stage in ("count_params", "finetune", "sample", "fid"):
        said = set()
        for name, pipeline in PIPELINES.items():
            text = FILES[name]["stages"][stage]
            words = text["cmd"].replace(pipeline.resolved, "RESOLVED").split()
            code = [dependency for dependency in text["deps"] if dependency.startswith("dp_lora/")]
            own = " ".join([*words, *text["outs"]]).replace("outputs/diffusers/$", "outputs/$")
            said.add((own, *code, *keys_of(name, stage)))
        assert len(said) == 1, stage


@each_pipeline
def test_params_yaml_stands_beside_each_pipeline_and_its_stages_read_that_one(name):
    values = yaml.safe_load(PIPELINES[name].params.read_text(encoding="utf-8"))
    assert tuple(values) == STAGES["main"].parameters
    listed = FILES[name]["stages"]["resolve"]["params"]
    path = PIPELINES[name].params.relative_to(ROOT).as_posix()
    assert (listed if name == "letters" else listed[0][path]) == list(values)


@each_pipeline
def test_a_config_belongs_to_the_pipeline_whose_folders_it_names(name):
    config = config_of(name)
    assert pipeline_of(config) is PIPELINES[name]
    assert outside_folders(config) == PIPELINES[name].folders
    outside = [folder for folder in PIPELINES[name].folders if folder is not None]
    assert from_outside(config) == [ROOT / folder for folder in outside]
    made = {"letters": "outputs/mnist5k/data", "diffusers": "outputs/diffusers/text2image/data"}
    assert private_data(config) == ROOT / (PIPELINES[name].private or made[name])
    given = PIPELINES[name].given_base
    assert config.model.base == ("someone/base" if given else list(PIPELINES[name].made)[-1])


def test_private_pictures_of_the_hub_may_lie_in_any_folder_beside_a_given_base():
    revision = "cd" * 20
    pictures = (
        f"data.source=huggingface data.folder=data/faces huggingface.repo=a/b huggingface.revision={revision} "
        "huggingface.train_files=[a] huggingface.test_files=[b] huggingface.train_rows=1 huggingface.test_rows=1 "
        "huggingface.size=1 huggingface.licence=none"
    )
    config = load("text2image", {}, f"{GIVEN} {pictures}")
    assert pipeline_of(config) is PIPELINES["diffusers"]
    assert private_data(config) == ROOT / "data/faces"
    assert public_data(config) == ROOT / "outputs/diffusers/letters"
    assert stages_of("diffusers", "huggingface.revision") == {"prepare"}


def test_autoencoder_and_public_pictures_are_the_pipeline_s():
    for name, public in (("letters", "outputs/letters/data"), ("emnist", "data/emnist"), ("emoji", "data/openmoji")):
        assert public_data(config_of(name)) == ROOT / public
        autoencoder = autoencoder_folder(config_of(name)).relative_to(ROOT).as_posix()
        assert PIPELINES[name].made[autoencoder] == "pretrain_ae"
    with pytest.raises(InputError, match="imported from data/cin256"):
        public_data(config_of("celebahq"))


def test_a_config_that_fits_no_pipeline_is_refused_in_one_line():
    config = load("celebahq-eps10", {}, "data.folder=data/other")
    with pytest.raises(InputError, match=r"no pipeline depends on .*data\.folder=data/other; there are dvc\.yaml, "):
        pipeline_of(config)


def test_a_config_without_public_letters_needs_inception_before_it_starts():
    with pytest.raises(InputError, match=r"inception_weights=null.*FID alone"):
        require_distance(config_of("celebahq"))
    require_distance(load("celebahq-eps10", {}, "evaluation.inception_weights=weights.pt"))
    require_distance(config_of("emnist"))


def test_what_has_to_come_from_outside_is_missing_until_prepare_has_written_source_json(tmp_path, monkeypatch):
    from dp_lora.cli import pipelines
    from dp_lora.config import paths

    for module in (paths, pipelines):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    config = config_of("celebahq")
    with pytest.raises(InputError) as error:
        require(config, from_outside(config))
    assert str(error.value) == (
        "data/cin256 and data/celebahq: missing; type `.venv/bin/mlflow run . -b native -e prepare "
        "-P config=celebahq-eps10` or, where a DVC remote has it, `dvc pull data/cin256 data/celebahq`"
    )
    for folder in ("data/cin256", "data/celebahq"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "data/cin256/source.json").write_text("{}")
    with pytest.raises(InputError, match=r"^data/celebahq: missing; .* `dvc pull data/celebahq`$"):
        require(config, from_outside(config))
    (tmp_path / "data/celebahq/source.json").write_text("{}")
    require(config, from_outside(config))


@pytest.mark.parametrize(
    ("name", "stage"),
    [("letters", "pretrain_ldm"), ("celebahq", "pipelines/celebahq/dvc.yaml:import_base"),
     ("emnist", "pipelines/emnist/dvc.yaml:pretrain_ldm"), ("emoji", "pipelines/emoji/dvc.yaml:pretrain_ldm")],
)  # fmt: skip
def test_a_missing_base_is_made_by_its_own_pipeline_whose_params_come_back(name, stage, tmp_path, monkeypatch):
    from dp_lora.cli import pipeline, pipelines
    from dp_lora.config import paths

    for module in (paths, pipeline, pipelines):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    seen = {}

    def dvc(*arguments, environment, tied):
        seen["arguments"], seen["params"] = arguments, yaml.safe_load(PIPELINES[name].params.read_text())

    monkeypatch.setattr(pipeline, "dvc", dvc)
    config, params = config_of(name), PIPELINES[name].params
    params.parent.mkdir(parents=True, exist_ok=True)
    params.write_text("config: before\n")
    base = tmp_path / config.model.base
    outside = [folder for folder in PIPELINES[name].folders[:2] if folder is not None]
    typed = {"config": EXPERIMENTS[name][0], "eps": "5"}
    if outside:
        with pytest.raises(InputError, match=f"^{outside[0]}: missing; type"):
            pipeline.make_missing(config, typed, {}, base)
        assert not seen
    for folder in outside:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "source.json").write_text("{}")
    pipeline.make_missing(config, typed, {}, base)
    assert seen["arguments"] == ("repro", stage)
    assert {key: value for key, value in seen["params"].items() if value is not None} == {
        "config": EXPERIMENTS[name][0]
    }
    assert params.read_text() == "config: before\n"
