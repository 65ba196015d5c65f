"""Files for a server of datasets and checkpoints: an archive like cin256's, Parquet files like CelebA-HQ's."""

import io
import json
import os
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dp_lora.data.png import encode_png

WEIGHTS = os.urandom(100_000)


def archive(content: bytes = WEIGHTS, member: str = "model.ckpt") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(member, content)
    return buffer.getvalue()


REVISION = "0123456789abcdef0123456789abcdef01234567"
FILES = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
TEST_FILE = "data/validation-00000-of-00001.parquet"
ROWS = {FILES[0]: 30, FILES[1]: 20, TEST_FILE: 10}
CLASSES = ["female", "male"]
SETTINGS = (
    "checkpoint.url=null checkpoint.folder=null huggingface.repo=somebody/faces "
    f"huggingface.revision={REVISION} huggingface.train_files=[{','.join(FILES)}] huggingface.test_files=[{TEST_FILE}] "
    "huggingface.train_rows=50 huggingface.test_rows=10 huggingface.size=100000 data.size=16"
)


def image_of(file: str, row: int) -> np.ndarray:
    """A picture whose first pixel holds its file, its row and its class."""
    image = np.random.default_rng([sorted(ROWS).index(file), row]).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image[0, 0] = (sorted(ROWS).index(file), row, label_of(file, row))
    return image


def label_of(file: str, row: int) -> int:
    return int(np.random.default_rng([7, sorted(ROWS).index(file), row]).integers(2))


def rows_of(file: str) -> tuple[list[bytes], list[int]]:
    rows = range(ROWS[file])
    return [encode_png(image_of(file, row)) for row in rows], [label_of(file, row) for row in rows]


def parquet(pictures: list, labels: list, names: list[str] | None = CLASSES, column: str = "image", **options) -> bytes:
    """A Parquet file as the library datasets writes it, with several row groups."""
    image = pa.array([{"bytes": p, "path": f"{i}.png"} for i, p in enumerate(pictures)], pa.struct(
        [("bytes", pa.binary()), ("path", pa.string())]
    ))  # fmt: skip
    features = {column: {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if names else None
    table = pa.table({column: image, "label": pa.array(labels)}).replace_schema_metadata(metadata)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **{"row_group_size": 8, "write_page_checksum": True, **options})
    return buffer.getvalue()


def captioned(file: str, captions: list | None, column: str = "text") -> bytes:
    """The file's pictures with captions, and no labels."""
    table = pq.read_table(io.BytesIO(parquet(*rows_of(file)))).select(["image"])
    buffer = io.BytesIO()
    pq.write_table(table if captions is None else table.append_column(column, [captions]), buffer, row_group_size=8)
    return buffer.getvalue()


def path_of(file: str) -> str:
    return f"/datasets/somebody/faces/resolve/{REVISION}/{file}"
