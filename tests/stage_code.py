"""The code that each DVC stage has to depend on. `python -m tests.stage_code` writes it into the pipelines' dvc.yaml.

That is the stage's entry point and all modules of dp_lora that it imports, except the modules that all entry points
share: they start, place and track the work, and compute nothing.
"""

import ast
import re
from pathlib import Path

import yaml

from dp_lora.cli.pipelines import PIPELINES
from dp_lora.config import ROOT
from dp_lora.sources import has_code, shown, sources

FILES = {name: ROOT / pipeline.file for name, pipeline in PIPELINES.items()}


def is_code(dependency: str) -> bool:
    return dependency.startswith(("dp_lora", "entrypoints"))


def code_of(command: str) -> list[str]:
    """Dependencies of a stage with this command: files, or a package if all its files are dependencies."""
    files = {shown(path) for path in sources(ROOT / "entrypoints" / f"{command.split()[1]}.py")}
    packages = {name for name in map(str, {Path(file).parent for file in files}) if _all_of(name) <= files}
    inside = {file for name in packages if name != "entrypoints" for file in _all_of(name)}
    return sorted((files - inside) | (packages - {"entrypoints"}))


def _all_of(package: str) -> set[str]:
    files = (ROOT / package).rglob("*.py")
    return {shown(path) for path in files if has_code(ast.parse(path.read_text(encoding="utf-8")))}


def write(path: Path) -> None:
    """Write the code that each stage runs into a dvc.yaml; everything else in it stays as it is."""
    text = path.read_text(encoding="utf-8")
    for name, stage in yaml.safe_load(text)["stages"].items():
        if stage.get("always_changed"):
            continue
        others = [dependency for dependency in stage.get("deps", []) if not is_code(dependency)]
        lines = "".join(f"      - {dependency}\n" for dependency in [*others, *code_of(stage["cmd"])])
        block = re.compile(rf"(\n  {name}:\n(?:    .*\n)*?)    deps:.*\n(?:      - .*\n)*")
        text, times = block.subn(lambda found, lines=lines: f"{found[1]}    deps:\n{lines}", text)
        assert times == 1, name
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for file in FILES.values():
        write(file)
