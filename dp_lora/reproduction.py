"""Compare two productions of one result, file by file."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dp_lora.files import digest_file, digest_folder

NAMES_A_RUN = "run_id"  # random by design; in every JSON file that names the run that made it


class ComparedFile(NamedTuple):
    """One file: whether it is equal, and the difference in words."""

    file: str
    equal: bool
    words: str


def manifest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, by its relative name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): digest_file(path) for path in files}


def digests(folder: Path, private: Iterable[Path], sign: Callable[[str], str]) -> dict[str, str]:
    """`manifest`, but each of `private` (`folder` itself, or paths in it) has one digest alone, signed by `sign`.

    This digest stands under the relative name with a slash.
    """
    signed = {f"{path.relative_to(folder).as_posix()}/": sign(_digest(path)) for path in private}
    if "./" in signed:
        return signed
    public = {name: digest for name, digest in manifest(folder).items() if not f"{name}/".startswith(tuple(signed))}
    return public | signed


def _digest(path: Path) -> str:
    return digest_folder(path) if path.is_dir() else digest_file(path)


def compare(recorded: Mapping[str, str], before: Path, after: Path, sign: Callable[[str], str]) -> list[ComparedFile]:
    """Compare every file of `recorded`, the `digests` once taken of `before`, with the files now in `after`.

    Where a file of `before` is still as recorded, the comparison also says by how much the other one differs.
    """
    signed = [name for name in sorted(recorded) if name.endswith("/")]
    made = digests(after, [after / name for name in signed if (after / name).exists()], sign)
    found = []
    for name in sorted(recorded.keys() | made.keys()):
        if name not in made:
            found.append(ComparedFile(name, False, "missing in the second making"))
        elif name not in recorded:
            found.append(ComparedFile(name, False, "not there in the first making"))
        elif recorded[name] == made[name]:
            found.append(ComparedFile(name, True, "equal"))
        elif name in signed:
            found += _compare_signed(name, recorded[name], before / name, after / name, sign)
        elif not (before / name).is_file() or digest_file(before / name) != recorded[name]:
            found.append(ComparedFile(name, False, "different; the first making's file is gone"))
        else:
            found.append(_difference(name, before / name, after / name))
    return found


def _compare_signed(
    name: str, recorded: str, before: Path, after: Path, sign: Callable[[str], str]
) -> list[ComparedFile]:
    """File by file where the folder of the first making is still there, else the folder as a whole."""
    if not before.is_dir() or sign(digest_folder(before)) != recorded:
        return [ComparedFile(name, False, "different; the first making's files are gone")]
    return [
        one._replace(file=(Path(name) / one.file).as_posix()) for one in compare(manifest(before), before, after, sign)
    ]


def _difference(name: str, before: Path, after: Path) -> ComparedFile:
    if before.suffix == ".json":
        first, second = (_without_run(json.loads(path.read_text(encoding="utf-8"))) for path in (before, after))
        if first == second:
            return ComparedFile(name, True, f"equal but for {NAMES_A_RUN}")
        return ComparedFile(name, False, f"different: {', '.join(_other_values(first, second))}")
    largest = largest_difference(before, after)
    return ComparedFile(name, False, "different" if largest is None else f"different by at most {largest:.3g}")


def _without_run(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_run(item) for key, item in value.items() if key != NAMES_A_RUN}
    return [_without_run(item) for item in value] if isinstance(value, list) else value


def _other_values(first: Any, second: Any, where: str = "") -> list[str]:
    if isinstance(first, dict) and isinstance(second, dict):
        keys = sorted(first.keys() | second.keys())
        lists = [_other_values(first.get(key), second.get(key), f"{where}.{key}".lstrip(".")) for key in keys]
        return [line for lines in lists for line in lines]
    return [] if first == second else [f"{where} {str(first)[:40]} against {str(second)[:40]}"]


def largest_difference(before: Path, after: Path) -> float | None:
    """Largest absolute difference of two files' numbers; None where they hold no numbers, infinity for other shapes."""
    first, second = _arrays(before), _arrays(after)
    if first is None or second is None:
        return None
    if {name: array.shape for name, array in first.items()} != {name: array.shape for name, array in second.items()}:
        return math.inf
    gaps = [np.abs(first[name].astype(np.float64) - second[name]).max() for name in first if first[name].size]
    return float(max(gaps, default=0.0))


def _arrays(path: Path) -> dict[str, np.ndarray] | None:
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        return load_file(path)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files if archive[name].dtype.kind in "biuf"}
    if path.suffix == ".png":
        from PIL import Image

        with Image.open(path) as picture:
            return {"pixels": np.asarray(picture)}
    return None
