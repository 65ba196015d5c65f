"""The source files that a piece of work runs, by their imports: what stages, caches and private runs depend on."""

import ast
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from dp_lora.files import PACKAGE, digest_file, digest_value

# Files and packages on which no result depends, though all work imports them; a change there reruns nothing.
LEFT_OUT = {
    "dp_lora/__init__.py": "the version",
    "dp_lora/cli": "starts, places and tracks the work",
    "dp_lora/config": "what it resolves is among the params of each stage",
    "dp_lora/errors.py": "messages",
    "dp_lora/events.py": "messages",
    "dp_lora/progress.py": "messages",
    "dp_lora/operator_key.py": "names of folders",
    "dp_lora/tracking": "keeps what a run made",
    "dp_lora/models/estimate.py": "what a dry run says of time and memory",
    "dp_lora/models/flops.py": "what a dry run says of time and memory",
    "dp_lora/models/counted_rows.py": "what a dry run says of time and memory",
    "dp_lora/models/memory.py": "what a dry run says of time and memory",
    "dp_lora/models/row_memory.py": "what a dry run says of time and memory",
    "dp_lora/models/operations.py": "what a dry run says of time and memory",
    "dp_lora/models/shipped.py": "what a dry run says of time and memory",
    "dp_lora/training/dry_run_facts.py": "what a dry run says",
    "dp_lora/training/costs.py": "what a dry run says of time and memory",
    "dp_lora/training/measure.py": "what a dry run says of time and memory",
}


def sources(*starts: Path) -> list[Path]:
    """`starts` and every file of dp_lora that they import, directly or not, inside of functions too; sorted.

    But for LEFT_OUT, and what is imported through these alone. Files are read, not imported.
    """
    found: dict[Path, bool] = {}
    left_out = {PACKAGE.parent / name for name in LEFT_OUT}
    todo, named = list(starts), set[str]()
    while todo:
        path = todo.pop()
        if path not in found and left_out.isdisjoint((path, *path.parents)):
            found[path], names = _parsed(path.read_text(encoding="utf-8"))
            # each module is looked for once: most files import the same few
            todo += [file for name in names if name not in named for file in _files(name)]
            named.update(names)
    return sorted(path for path, code in found.items() if code)


def digest_code(*names: str) -> str:
    """SHA-256 over `sources` of these files, named from the package's folder: other code has another digest."""
    return digest_value([[shown(path), digest_file(path)] for path in sources(*(PACKAGE / name for name in names))])


def has_code(tree: ast.Module) -> bool:
    """Whether there is more in a file than its docstring: most packages' own file has nothing else."""
    return any(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in tree.body)


def shown(path: Path) -> str:
    """A source file as it is named everywhere: from the project's root, with slashes."""
    return path.relative_to(PACKAGE.parent).as_posix()


@lru_cache(maxsize=1024)  # one process asks for the code of several results, and parsing it all takes a second
def _parsed(text: str) -> tuple[bool, tuple[str, ...]]:
    """Whether a source file has code, and the modules of the package that it imports."""
    tree, names = ast.parse(text), list[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import module` as well as `from module import name`
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return has_code(tree), tuple(name for name in names if name.split(".")[0] == PACKAGE.name)


def _files(module: str) -> Iterator[Path]:
    """The files that importing a module of dp_lora runs: each package on the way, and its own."""
    _, *rest = module.split(".")
    place = PACKAGE
    yield place / "__init__.py"
    for name in rest:
        place = place / name
        if (place / "__init__.py").exists():
            yield place / "__init__.py"
        elif place.with_suffix(".py").exists():
            yield place.with_suffix(".py")
