"""Everything that a tracking store holds of its runs, leaf by leaf, and the leaves that may differ between neighbours.

Tests walk two stores side by side, whose runs saw N and N + 1 private pictures: only leaves that count as private may
differ.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

# "STAGE: WHERE" of leaves that differ between runs with the same data: results of noise, speed, random names
ASIDE = (
    r"\w+: bytes .*\.(safetensors|png|webp|npz)",  # weights, and pictures drawn from them
    r"\w+: metric (epsilon|.*per_second|peak_memory_gib)",
    r"\w+: tag (process|pid|host|mlflow\.source\.git\.commit|mlflow\.loggedImages)",
    r"\w+: dataset (adapter|samples)( digest)?",
    r"\w+: json .*(privacy\.json:|:privacy/)ledger_head",  # a hash over lines that name their process by a random id
    r"sample: json samples\.json:model",  # the digest of the model that drew
    r"(sample|finetune|export): json files\.json:result/.*",
    r"(sample|fid|export): json files\.json:(finetune|sample)/.*",
    r"main: json files\.json:result/(finetune|samples)/.*",
)


def runs_of(store: str) -> dict[str, Run]:
    """The newest runs of a store by stage and folder of their output, which tells the two `prepare` runs apart."""
    client = MlflowClient(store)
    found = client.search_runs([e.experiment_id for e in client.search_experiments()], order_by=["start_time ASC"])
    return {f"{run.data.tags['stage']} {Path(run.data.tags['output']).parent.name}": run for run in found}


def folder_of(run: Run) -> Path:
    """The folder in which a local store keeps a run's artifacts."""
    return Path(unquote(urlparse(run.info.artifact_uri).path))


def plain(text: Any, project: Path) -> str:
    """A text without its random or local parts: the project's place, run ids, commits, times."""
    text = str(text).replace(str(project), "PROJECT")
    text = re.sub(r"\b[0-9a-f]{40}\b|\b[0-9a-f]{32}\b|commit `[0-9a-f]{12}`", "ID", text)
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME", text)


def leaves(run: Run, project: Path) -> Iterator[tuple[str, str, str]]:
    """All that a run keeps, as (the name that the tag `private` would list, its place, its value)."""
    data = run.data
    for key, value in data.tags.items():
        yield key, f"tag {key}", plain(value, project)
    for key, value in data.params.items():
        yield key, f"param {key}", plain(value, project)
    for key, value in data.metrics.items():
        yield key, f"metric {key}", repr(value)
    for given in run.inputs.dataset_inputs:
        name = given.dataset.name
        yield name, f"dataset {name}", plain(given.dataset.digest, project)
        for key in ("source", "schema", "profile"):
            yield name, f"dataset {name} {key}", plain(getattr(given.dataset, key), project)
        for tag in given.tags:
            yield name, f"dataset {name} {tag.key}", plain(tag.value, project)
    folder = folder_of(run)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            # names of the chart page's files hold a time and a random id
            shown = re.sub(r"timestamp\+\d+\+[0-9a-f-]+", "NAME", name)
            for where, value in content(path):
                yield name, f"{where.partition(' ')[0]} {shown}{where.partition(' ')[2]}", plain(value, project)


def content(path: Path) -> Iterator[tuple[str, Any]]:
    """The leaves of a file: each value of JSON, YAML and CSV, each line of a text, and the digest of any other file."""
    if path.suffix == ".json":
        yield from _flat("json ", json.loads(path.read_text()))
    elif path.suffix in (".yaml", ".lock", ".dvc"):
        yield from _flat("yaml ", yaml.safe_load(path.read_text()))
    elif path.suffix == ".csv":
        yield from _flat("csv ", list(csv.reader(io.StringIO(path.read_text()))))
    elif path.suffix in (".txt", ".md"):
        yield from _flat("text ", path.read_text().splitlines())
    else:
        yield "bytes ", hashlib.sha256(path.read_bytes()).hexdigest()


def _flat(where: str, value: Any) -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield where, value
        return
    for key, item in items:
        yield from _flat(f"{where}{':' if where.endswith(' ') else '/'}{key}", item)


def differing(first: Run, second: Run, places: tuple[Path, Path]) -> dict[str, tuple[str, str | None, str | None]]:
    """Leaves that differ between two runs, by place: (name, first value, second value)."""
    pairs = ((first, places[0]), (second, places[1]))
    one, two = ({where: (name, value) for name, where, value in leaves(run, place)} for run, place in pairs)
    found = {}
    for where in sorted(one.keys() | two.keys()):
        name, before = one.get(where, (None, None))
        other, after = two.get(where, (None, None))
        if before != after:
            found[where] = (name or other or "", before, after)
    return found


def is_named(name: str, run: Run) -> bool:
    """Whether the tag `private` of a run lists this name, or the folder or picture that it belongs to."""
    listed = run.data.tags.get("private", "").split(", ")
    return any(one and (name == one or name.startswith((f"{one}/", f"{one}+"))) for one in listed)


def may_differ(stage: str, where: str, values: tuple[str | None, str | None]) -> bool:
    """Whether a leaf differs even between two runs on the same data: weights, random ids, times, keyed digests."""
    if where == "tag private" or any(re.fullmatch(known, f"{stage}: {where}") for known in ASIDE):
        return True
    # a folder's digest under the operator's key: nobody else can tell these 64 hex digits from random ones
    keyed = re.fullmatch(r"json files\.json:.*/", where) is not None
    return keyed and all(value is not None and re.fullmatch("[0-9a-f]{64}", value) for value in values)


def unnamed(first: dict[str, Run], second: dict[str, Run], places: tuple[Path, Path]) -> list[str]:
    """Leaves that tell the two stores' private data apart, and are in no tag `private`."""
    assert first.keys() == second.keys()
    found = []
    for stage, one in first.items():
        other = second[stage]
        for where, (name, before, after) in differing(one, other, places).items():
            if not may_differ(stage.split()[0], where, (before, after)) and not (
                is_named(name, one) and is_named(name, other)
            ):
                found.append(f"{stage}: {where}: {before} / {after}")
    return found


def hashes(data: bytes) -> set[bytes]:
    """Hashes by which anybody could test a candidate for these bytes."""
    return {hashlib.sha256(data).hexdigest().encode(), hashlib.md5(data).hexdigest().encode()}


def everything(project: Path) -> Iterator[tuple[str, bytes]]:
    """Every byte of a project's local store: names and contents of its files, of the database and of its journal."""
    for path in (*project.glob("mlflow.db*"), *(project / "mlartifacts").rglob("*")):
        yield path.relative_to(project).as_posix(), path.name.encode()
        if path.is_file():
            yield path.relative_to(project).as_posix(), path.read_bytes()


def told(project: Path, secrets: set[bytes]) -> list[str]:
    """The places of a project's store that hold one of these."""
    return sorted({f"{where}: {s.decode()}" for where, data in everything(project) for s in secrets if s in data})
