"""Pictures and tables as files in the layout that MLflow's pages look for.

MLflow's own log_image and log_table are not used: sent twice, they make a second picture or append the rows again.
"""

import json
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

IMAGES = "images"  # artifact folder of the chart page's pictures


def image_key(name: str) -> str:
    """The prefix of a picture's file names for the chart page."""
    return re.sub("/", "~", name)


def write_images(picture: Path, key: str, step: int, folder: Path) -> None:
    """Write a picture file and its thumbnail into `folder`, named for the chart page.

    `key` is the picture's `image_key`, `step` its step.
    """
    from mlflow.tracking.multimedia import compress_image_size
    from PIL import Image

    milliseconds = time.time_ns() // 1_000_000
    name = f"{key}+step+{step}+timestamp+{milliseconds}+{uuid.uuid4()}"
    with Image.open(picture) as opened:
        # the thumbnail's format has no palette
        shown = opened.convert("RGB")
    folder.mkdir(parents=True)
    shown.save(folder / f"{name}.png")
    compress_image_size(shown).save(folder / f"{name}+compressed.webp")


def image_tags() -> dict[str, str]:
    """The tag that tells the chart page that the run has pictures."""
    from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_IMAGES

    return {MLFLOW_LOGGED_IMAGES: "True"}


def table_text(columns: Mapping[str, Sequence[Any]]) -> str:
    """Columns of equal length as a table's JSON."""
    import pandas

    return pandas.DataFrame({key: list(column) for key, column in columns.items()}).to_json(orient="split", index=False)


def table_tags(known: Mapping[str, str], file: str) -> dict[str, str]:
    """The tag that tells the run's page that the artifact `file` is a table; keeps the tables of `known`."""
    from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

    listed = json.loads(known.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
    table = {"path": file, "type": "table"}
    return {MLFLOW_LOGGED_ARTIFACTS: json.dumps(listed if table in listed else [*listed, table])}
