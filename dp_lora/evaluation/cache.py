"""Results that do not depend on the samples, kept by a digest of everything that they depend on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dp_lora.evaluation.classifier import Classifier, load_classifier, save_classifier
from dp_lora.files import digest_value, private_folder, read_json, whole_file, write_json
from dp_lora.sources import digest_code

CODE = "evaluation/evaluate.py"  # kept results depend on this file and all that it imports
Kind = TypeVar("Kind")


class Cache:
    """One folder of files NAME-DIGEST.*; runs share them. Private data enters without noise: for the operator alone.

    Folder 0700, files 0600.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = private_folder(Path(folder))

    def json(self, name: str, facts: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A JSON object; its facts are stored beside it for whoever opens the file."""
        path = self._path(name, facts, "json")
        if not path.exists():
            write_json(path, {"facts": facts, "value": make()}, private=True)
        return read_json(path)["value"]

    def classifier(self, name: str, facts: dict[str, Any], make: Callable[[], Classifier]) -> Classifier:
        return self._file(self._path(name, facts, "safetensors"), make, load_classifier, save_classifier)

    def array(self, name: str, facts: dict[str, Any], make: Callable[[], NDArray]) -> NDArray:
        return self._file(self._path(name, facts, "npy"), make, _load_array, _save_array)

    def _path(self, name: str, facts: dict[str, Any], ending: str) -> Path:
        return self.folder / f"{name}-{digest_value([facts, digest_code(CODE)])[:20]}.{ending}"

    def _file(
        self,
        path: Path,
        make: Callable[[], Kind],
        load: Callable[[Path], Kind],
        save: Callable[[Path, Kind], None],
    ) -> Kind:
        if not path.exists():
            save(path, make())
        return load(path)  # also after making it: a result must not depend on whether it was cached


def _load_array(path: Path) -> NDArray:
    return np.load(path, allow_pickle=False)


def _save_array(path: Path, value: NDArray) -> None:
    with whole_file(path, private=True) as temporary:
        np.save(temporary, value)
