"""The order of the project: allowed imports, one list of parameters, one list of pins, no path of any machine."""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions

import pytest
import yaml

from dp_lora import __version__
from dp_lora import sources as code
from dp_lora.config import ROOT, STAGES
from dp_lora.events import Events
from dp_lora.tracking import registry

COMMON = {"config", "errors", "files", "events", "progress", "team"}
# room (a folder or module of dp_lora) -> rooms that it may import, beside COMMON
ARROWS = {
    "errors": set(),
    "files": {"errors"},
    "events": set(),
    "progress": set(),
    "team": {"errors"},
    "launch": {"config", "errors", "team"},
    "learning_rate": set(),
    "config": {"errors", "files"},
    "diffusion": {"errors"},
    "privacy": {"errors", "files", "team"},
    "grids": {"files"},
    "data": {"models", "sources"},  # latents.py encodes with the base's autoencoder
    "models": {"diffusion"},
    "release": {"privacy", "models"},
    "statement": {"privacy"},
    "operator_key": {"files"},
    "sources": set(),
    "reproduction": set(),
    "export": {"release", "statement", "models"},
    "sampling": {"models", "data", "grids", "sources"},
    "evaluation": {"diffusion", "learning_rate", "models", "data", "sampling", "sources"},
    "training": {
        "data",
        "learning_rate",
        "models",
        "diffusion",
        "privacy",
        "release",
        "sampling",
        "grids",
        "operator_key",
        "sources",
        "statement",
    },
    "slurm": {"config", "errors", "files"},
    "tracking": {"slurm"},
    "served_model": {"models", "sampling"},
    "project_run": {"tracking"},
    "native_backend": {"project_run", "tracking"},
    "slurm_backend": {"project_run", "slurm", "tracking"},
    "doctor": {"tracking"},
    "cli": {
        "data",
        "models",
        "operator_key",
        "privacy",
        "reproduction",
        "slurm",
        "statement",
        "study",
        "tracking",
        "training",
    },
    "commands": {
        "cli",
        "data",
        "evaluation",
        "export",
        "launch",
        "models",
        "reproduction",
        "sampling",
        "slurm",
        "statement",
        "study",
        "tracking",
        "training",
    },
    "study": {"models", "privacy", "slurm", "sources", "tracking", "training"},
    "__main__": {"cli"},  # each command is imported by its name
}


PACKAGES = ("dp_lora", "entrypoints", "benchmarks")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
}


def room_of(path) -> str:
    return path.relative_to(ROOT / "dp_lora").parts[0].removesuffix(".py")


@functools.cache
def imports_of(path) -> list[str]:
    """Modules that a file imports, at its head or late; `from package import name` counts as `package.name`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name if name in MODULES else node.module for name in names]
    return found


def sources():
    return [
        path
        for path in sorted((ROOT / "dp_lora").rglob("*.py"))
        if path.name != "__init__.py" or path.parent.name != "dp_lora"
    ]


def test_every_room_imports_only_what_it_may_know_and_every_arrow_is_used():
    used = {room: set() for room in ARROWS}
    for path in sources():
        room = room_of(path)
        own = {"errors", "files"} if room in ("privacy", "diffusion") else COMMON
        for module in imports_of(path):
            if module.startswith("dp_lora."):
                other = module.split(".")[1]
                used[room].add(other)
                assert other == room or other in ARROWS[room] | (own if room not in COMMON else set()), (
                    f"{path}: {module}"
                )
    assert {room: ARROWS[room] - used[room] for room in ARROWS} == {room: set() for room in ARROWS}


def require_no_circle(graph):
    """Fail with the names of a circle if there is one; `graph`: node -> nodes that it leads to."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_imports_run_in_no_circle_late_ones_counted():
    modules = {name: {*imports_of(path)} & (MODULES.keys() - {name}) for name, path in MODULES.items()}
    assert sum(map(len, modules.values())) > 400
    require_no_circle(modules)
    rooms = {room: set() for room in ARROWS}
    for path in sources():
        named = {module.split(".")[1] for module in imports_of(path) if module.startswith("dp_lora.")}
        rooms[room_of(path)] |= named - {room_of(path)}
    require_no_circle(rooms)


# modules that make or the docs start by name
COMMANDS = ("tests.pictures", "tests.stage_code", "tests.gpu.gather")


def test_no_test_imports_another_and_what_tests_share_lies_in_tests_support():
    paths = [path for path in sorted((ROOT / "tests").rglob("*.py")) if path.stem != "__init__"]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    stems = {path.stem for path in paths}
    for module, path in modules.items():
        test = path.stem.startswith("test_") or path.stem == "conftest"
        assert module.startswith("tests.support.") != (test or module in COMMANDS), module
        # search the text, because a script in a string imports too
        found = re.findall(r"^\s*(?:from|import) +([\w.]+(?: +import +\w+)?)", path.read_text("utf-8"), re.MULTILINE)
        for name in (re.sub(" +import +", ".", words) for words in found):
            assert name.split(".")[0] not in stems, f"{module}: {name}: the way is tests.support"
            assert not name.startswith("tests.") or name.startswith(("tests.support.", *COMMANDS)), f"{module}: {name}"


def test_a_registered_model_takes_every_room_along_that_its_code_imports():
    taken = {name.removesuffix(".py") for name in registry.ROOMS}
    for path in sources():
        if room_of(path) in taken | {"served_model"}:
            imported = {module.split(".")[1] for module in imports_of(path) if module.startswith("dp_lora.")}
            assert imported <= taken, path


def test_the_numerical_core_knows_neither_mlflow_nor_click_nor_dvc():
    for path in sources():
        backends = ("project_run", "native_backend", "slurm_backend")
        if room_of(path) not in ("tracking", *backends, "served_model", "cli", "commands", "__main__"):
            roots = {module.split(".")[0] for module in imports_of(path)}
            assert not roots & {"mlflow", "click", "dvc", "entrypoints"}, path


def test_the_private_step_is_given_tensors_and_knows_no_diffusion():
    for path in sorted((ROOT / "dp_lora" / "privacy").glob("*.py")):
        roots = {module.split(".")[0] for module in imports_of(path)}
        assert not roots & {"diffusers", "peft", "lightning", "pyarrow"}, path


def test_mlproject_click_and_readme_have_the_same_entry_points_and_parameters():
    import importlib

    project = yaml.safe_load((ROOT / "MLproject").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| (`[^|]*`) \|$", readme, flags=re.MULTILINE))
    assert set(project["entry_points"]) == set(STAGES) == set(rows)
    for name, stage in STAGES.items():
        parameters = stage.parameters
        entry = project["entry_points"][name]
        assert tuple(entry["parameters"]) == parameters
        assert {p: spec["default"] for p, spec in entry["parameters"].items() if p != "config"} == {
            p: "" for p in parameters if p != "config"
        }
        # MLflow quotes the values itself; quotes of ours would make them injectable
        assert entry["command"] == f"python -m entrypoints.{name} " + " ".join(f"--{p} {{{p}}}" for p in parameters)
        command = importlib.import_module(f"entrypoints.{name}").main
        visible = [option.name for option in command.params if not option.hidden and option.name != "dry_run"]
        assert tuple(visible) == parameters
        assert re.findall(r"`(\w+)`", rows[name]) == list(parameters)


def test_conda_yaml_and_pyproject_name_the_same_pins_and_the_lock_keeps_them():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    conda = yaml.safe_load((ROOT / "conda.yaml").read_text(encoding="utf-8"))
    assert conda["dependencies"][-1]["pip"] == project["dependencies"]
    files = ("requirements.lock", "requirements-emoji.lock")
    lock = "".join((ROOT / file).read_text(encoding="utf-8") for file in files)
    pins = dict(re.findall(r"^([a-z0-9.\-]+)==([^ ]+)", lock, flags=re.MULTILINE))
    for requirement in [*project["dependencies"], *(r for e in project["optional-dependencies"].values() for r in e)]:
        name, version = requirement.split("==")
        assert pins[name.lower().replace("_", "-")] == version
    assert tuple(int(part) for part in pins["scipy"].split(".")[:2]) < (1, 18)
    assert "://" not in lock
    assert lock.count("--hash=sha256:") > len(pins)


def distribution(requirement: str) -> str:
    return re.split(r"[=<>!~ \[;]", requirement)[0].lower().replace("_", "-")


def imported(*folders: str) -> dict[str, set[str]]:
    """Outside packages that files of these folders import, each with the distributions that hold it."""
    known = packages_distributions()
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    ours = {*PACKAGES, "tests"}
    roots = {module.split(".")[0] for path in files for module in imports_of(path)} - ours - sys.stdlib_module_names
    return {root: {distribution(name) for name in known.get(root, [root])} for root in roots}


def test_what_code_imports_is_declared_and_what_is_declared_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {distribution(requirement) for requirement in project["dependencies"]}
    declared_with = declared | {distribution(line) for line in project["optional-dependencies"]["emoji"]}
    in_use = imported("dp_lora", "entrypoints", "benchmarks", "docker", ".ci")
    assert {root for root, holders in in_use.items() if not holders & declared_with} == set()
    # setuptools builds the package
    assert declared - set().union(*in_use.values()) == {"setuptools"}

    browser = (ROOT / "tests/requirements-ui.in").read_text(encoding="utf-8").splitlines()
    more = {distribution(line) for line in [*project["optional-dependencies"]["dev"], *browser]}
    assert {root for root, holders in imported("tests").items() if not holders & (declared | more)} == set()


def git(*arguments: str) -> str:
    """The output of a command of git in the project; the test fails where there is none."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout:
        pytest.fail("not a git checkout")
    return done.stdout


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == __version__
    assert f"version: {__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    # an image of another version would start the code before the release
    images = Counter(git("grep", "-ohE", "/dp-lora:[0-9][0-9.]*[0-9]").split())
    assert images.keys() == {f"/dp-lora:{__version__}"}
    assert images.total() >= 10


def test_params_yaml_has_the_parameters_of_main():
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    assert tuple(values) == STAGES["main"].parameters


def test_the_top_level_is_what_it_is_said_to_be():
    top = {line.split("/")[0] for line in git("ls-files").splitlines()}
    assert {
        "MLproject", "conda.yaml", "docker", "pipelines",
        "dvc.yaml", "params.yaml", "data.dvc", "configs", "docs", "dp_lora", "entrypoints", "tests",
        "benchmarks", "pyproject.toml", "requirements.lock", "Makefile", "README.md", "LICENSE", "CITATION.cff", ".ci",
    } <= top  # fmt: skip


def test_environment_variables_of_ours_have_one_prefix():
    command = ["git", "-C", str(ROOT), "grep", "--untracked", "-lE", "DP_LORA_[A-Z]", "--", ":!tests"]
    named = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    # of the two files below, the first sets the old name for code of an older commit, the second refuses it
    found = [name for name in named if name != "docs/running.md"]  # click itself makes the name _DP_LORA_COMPLETE
    assert found == ["dp_lora/cli/remaking.py", "dp_lora/tracking/provenance.py"]


def test_each_cache_is_keyed_by_all_code_that_makes_what_it_keeps():
    latents_and_scores = {
        "data/latents.py": ("data/layout.py", "data/pixels.py", "data/png.py", "models/autoencoder.py"),
        "evaluation/evaluate.py": ("evaluation/classifier.py", "sampling/ddim.py", "models/unet.py", "data/layout.py"),
        "sampling/__init__.py": ("sampling/ddim.py", "sampling/noise.py", "models/attention.py", "data/png.py"),
    }
    for start, needed in latents_and_scores.items():
        found = {path.relative_to(ROOT / "dp_lora").as_posix() for path in code.sources(ROOT / "dp_lora" / start)}
        assert {start, *needed} <= found
    keyed = (path for path in sources() if "digest_code(" in path.read_text(encoding="utf-8"))
    assert {room_of(path) for path in keyed} == {"data", "evaluation", "sampling", "study", "training", "sources"}


def test_a_fine_tuning_is_resolved_and_its_pictures_are_encoded_in_one_place():
    """Otherwise a dry run, the other ranks and the training could each resolve it in their own way."""
    texts = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in MODULES.values()}

    def callers(function: str) -> set[str]:
        called = re.compile(rf"(?<!def )\b{function}\(")
        return {name for name, text in texts.items() if called.search(text)}

    assert callers("parent_parts") == {"dp_lora/cli/finetuning.py"}
    # a working folder compares its plan with the one that its configuration gives now
    # an audit attacks a plan and keeps no trained weights; a study's report shows both accountings of a plan
    audits = {"dp_lora/training/audit.py", "dp_lora/training/dry_run_facts.py", "dp_lora/study/audits.py"}
    assert callers("make_plan") - audits == {"dp_lora/cli/finetuning.py", "dp_lora/training/run_folder.py"}
    # elsewhere a mapped file could lack its blocks, and a full disk would end the process without a line
    assert callers("open_memmap") == {"dp_lora/data/mapped.py"}
    assert callers("encode_dataset") == {"dp_lora/training/ldm.py", "dp_lora/training/private_run.py"}
    assert len(texts["dp_lora/commands/finetune.py"].splitlines()) <= 130


def parsed():
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES.values()}


def test_text_is_read_and_written_in_a_named_encoding():
    bare = [
        f"{path.name}:{node.lineno}"
        for path, tree in parsed().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if node.func.attr in ("read_text", "write_text") and not any(word.arg == "encoding" for word in node.keywords)
    ]
    assert bare == []


def test_no_name_at_the_head_of_a_module_and_no_parameter_of_a_plain_function_is_unused():
    trees = parsed()
    loaded = {node.id for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.Name)
              and isinstance(node.ctx, ast.Load)}  # fmt: skip
    loaded |= {node.attr for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    unused = []
    for path, tree in trees.items():
        for node in tree.body:
            names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
            targets = node.targets if isinstance(node, ast.Assign) else []
            names += [target.id for target in targets if isinstance(target, ast.Name)]
            unused += [f"{path.name}: {name}" for name in names if name not in loaded and not name.startswith("__")]
            if isinstance(node, ast.FunctionDef):
                read = {inside.id for inside in ast.walk(node) if isinstance(inside, ast.Name)}
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                unused += [
                    f"{path.name}: {node.name}({one.arg})" for one in given if one.arg not in read and one.arg[0] != "_"
                ]
    # these have users elsewhere: MLflow finds the backends by their entry points, docs/python.md shows each_row
    assert sorted(unused) == [
        "native_backend.py: NativeBackend",
        "per_row.py: each_row",
        "slurm_backend.py: SlurmBackend",
    ]


def test_a_listener_is_asked_for_what_the_core_tells_and_for_nothing_else():
    told = {name for path in sources() for name in re.findall(r"\bevents\.(\w+)\(", path.read_text(encoding="utf-8"))}
    assert told == {name for name in vars(Events) if not name.startswith("_")}


def documented(path):
    """Name and docstring of the public functions and methods of a module."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for node in [*body, *(inside for outer in body if isinstance(outer, ast.ClassDef) for inside in outer.body)]:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, ast.get_docstring(node) or ""


# these convert a plan, a part or a bound to another form, or name a property that the plan's own fields define
FORMS = {"as_json", "from_json", "private", "guaranteed", "fresh"}


def test_every_function_of_the_private_step_ends_in_its_guarantee():
    checked = 0
    for path in sorted((ROOT / "dp_lora" / "privacy").glob("*.py")):
        for name, text in documented(path):
            if name not in FORMS:
                assert "Guarantee: " in text.split("\n\n")[-1], f"{path.name}: {name}"
                checked += 1
    assert checked > 30
