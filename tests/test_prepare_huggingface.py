"""A Hugging Face dataset, through the real client and a server of the test's own; every fault names file and row."""

import io
import multiprocessing
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants
from mlflow import MlflowClient
from PIL import Image

from dp_lora.commands.prepare import main as prepare
from dp_lora.config import load, write_resolved
from dp_lora.data import extraction
from dp_lora.data.layout import read_dataset
from dp_lora.data.parquet import Wanted, open_file, read_batches
from dp_lora.data.png import SIGNATURE, as_png, decode_png, encode_png, is_whole_png
from dp_lora.errors import PRIVATE_PICTURE
from dp_lora.files import digest_file, read_json
from tests.support.download_server import Server, serving
from tests.support.prepare_call import Project
from tests.support.served import (
    CLASSES,
    FILES,
    REVISION,
    ROWS,
    SETTINGS,
    TEST_FILE,
    captioned,
    image_of,
    label_of,
    parquet,
    path_of,
    rows_of,
)


@pytest.fixture(scope="module")
def contents() -> dict[str, bytes]:
    return {path_of(file): parquet(*rows_of(file)) for file in ROWS}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, contents: dict[str, bytes]) -> Iterator[Server]:
    # two workers on any machine; the library reads its settings once, at import
    monkeypatch.setattr(extraction, "workers_of_this_machine", lambda: 2)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with serving() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.files |= contents
        yield server


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the workers' code in this process: many faults are the same in a worker or not, and this is faster."""
    from concurrent.futures import ThreadPoolExecutor
    from contextlib import contextmanager

    @contextmanager
    def threads():
        with ThreadPoolExecutor(1) as pool:
            yield pool, 1

    monkeypatch.setattr(extraction, "_workers", threads)


def downloads(server: Server) -> list[str]:
    return [path.rpartition("/")[2] for method, path, _ in server.requests if method == "GET"]


def test_every_picture_keeps_its_label_its_split_and_its_very_bytes(project: Project, hub: Server):
    result = project.prepare("celebahq", SETTINGS)
    assert result.exit_code == 0, result.output
    assert "images/s" in result.stderr
    assert "free" in result.stderr.partition("images/s")[0]  # checks the disk before it starts
    assert not multiprocessing.active_children()
    folder = project.root / "data/celebahq"
    assert project.shown() == ["celebahq"]
    assert sorted(p.name for p in folder.iterdir()) == ["dataset.json", "images", "metadata.parquet", "source.json"]
    for split, files in (("train", FILES), ("test", [TEST_FILE])):
        dataset = read_dataset(folder, CLASSES, split)
        expected = [(file, row) for file in files for row in range(ROWS[file])]
        assert len(dataset) == len(expected)
        for place, (file, row) in enumerate(expected):
            # pixels and label come from the same row: a shift by one, or swapped files, would show
            assert dataset.images([place])[0, 0, 0].tolist() == image_of(file, row)[0, 0].tolist()
            assert dataset.labels[place] == label_of(file, row) == dataset.images([place])[0, 0, 0, 2]
            stored = (folder / "images" / dataset.file_names[place]).read_bytes()
            assert stored == encode_png(image_of(file, row))
        assert 0 < dataset.labels.sum() < len(dataset)


def test_copies_are_named_or_refused_also_where_the_set_is_there(project: Project, hub: Server, one_process: None):
    pictures, labels = rows_of(FILES[1])
    pictures[17] = pictures[3]
    hub.files[path_of(FILES[1])] = parquet(pictures, labels)
    words = ("data.duplicates=refuse: 2 pictures in 1 group", "'train-000033.png'", "'train-000047.png'")
    refuse = f"{SETTINGS} data.duplicates=refuse"
    project.refused("celebahq", refuse, *words)
    assert project.shown() == []
    result = project.prepare("celebahq", SETTINGS)
    assert result.exit_code == 0, result.output
    assert all(word in result.stderr for word in words[1:])
    project.commits.clear()
    project.refused("celebahq", refuse, *words)


def test_source_json_names_the_origin_and_what_came(project: Project, hub: Server, one_process: None):
    assert project.prepare("celebahq", SETTINGS).exit_code == 0
    folder = project.root / "data/celebahq"
    source = read_json(folder / "source.json")
    assert source["origin"] == f"Hugging Face dataset somebody/faces at {REVISION}"
    assert (source["revision"], source["counts"]) == (REVISION, {"train": 50, "test": 10})
    assert source["size"] == sum(p.stat().st_size for p in (folder / "images").iterdir())
    assert source["sha256"] == digest_file(folder / "metadata.parquet")
    assert [f["sha256"] for f in source["files"]] == [hub.etag(path_of(file)) for file in (*FILES, TEST_FILE)]
    assert "CelebA" in read_json(folder / "dataset.json")["source"]["licence"]
    # the run in MLflow names it too
    from mlflow import MlflowClient

    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("dp-lora")
    assert experiment is not None
    (newest,) = client.search_runs([experiment.experiment_id], max_results=1)
    (dataset,) = newest.inputs.dataset_inputs
    tags = {tag.key: tag.value for tag in dataset.tags}
    assert (dataset.dataset.name, tags["origin"], tags["revision"]) == ("celebahq", source["origin"], REVISION)


def test_a_second_call_asks_nobody_and_another_revision_replaces_it(project: Project, hub: Server, one_process: None):
    assert project.prepare("celebahq", SETTINGS).exit_code == 0
    hub.requests.clear()
    assert project.prepare("celebahq", SETTINGS).exit_code == 0
    assert not hub.requests
    # a lost picture is noticed
    (project.root / "data/celebahq/images/train-000007.png").unlink()
    assert project.prepare("celebahq", SETTINGS).exit_code == 0
    assert not downloads(hub)
    assert (project.root / "data/celebahq/images/train-000007.png").exists()
    other = "f" * 40
    for file in ROWS:
        hub.files[path_of(file).replace(REVISION, other)] = hub.files.pop(path_of(file))
    assert project.prepare("celebahq", SETTINGS.replace(REVISION, other)).exit_code == 0
    assert read_json(project.root / "data/celebahq/source.json")["revision"] == other


def test_pictures_in_other_formats_become_png_of_the_same_pixels(project: Project, hub: Server, one_process: None):
    pictures, labels = rows_of(FILES[1])
    image = Image.fromarray(image_of(FILES[1], 3))
    for row, form in ((3, "BMP"), (4, "GIF")):
        buffer = io.BytesIO()
        (image if form == "BMP" else image.convert("L")).save(buffer, form)
        pictures[row] = buffer.getvalue()
    hub.files[path_of(FILES[1])] = parquet(pictures, labels)
    assert project.prepare("celebahq", SETTINGS).exit_code == 0
    images = project.root / "data/celebahq/images"
    assert (decode_png((images / "train-000033.png").read_bytes(), 16, 3) == np.asarray(image)).all()
    grey = decode_png((images / "train-000034.png").read_bytes(), 16, 3)
    assert (grey == np.asarray(image.convert("L"))[..., None]).all()


def test_png_bytes_are_copied_only_where_they_are_right():
    image = image_of(FILES[0], 0)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    right = buffer.getvalue()
    assert as_png(right, 16, 3) is right
    alpha = io.BytesIO()
    Image.fromarray(np.dstack([image, np.zeros((16, 16), np.uint8)])).save(alpha, "PNG")
    assert (decode_png(as_png(alpha.getvalue(), 16, 3), 16, 3) == 255).all()
    for wrong in (right[:-40], right[:100], b"", right[:60] + b"xxxx" + right[64:]):
        with pytest.raises(ValueError, match="picture"):
            as_png(wrong, 16, 3)


def test_a_png_that_is_called_whole_can_be_decoded_and_its_damage_is_seen():
    rng = np.random.default_rng(1)
    for channels in (1, 3):
        image = rng.integers(0, 256, (16, 16, channels), dtype=np.uint8)
        image[4:12] = 7
        png = encode_png(image)
        assert is_whole_png(png, 16, channels)
        assert not is_whole_png(png, 8, channels)
        assert not is_whole_png(png, 16, 4 - channels)
        for place in range(len(png)):
            # a flipped bit anywhere, an early end, something after the end
            assert not is_whole_png(png[:place] + bytes([png[place] ^ 1 << place % 8]) + png[place + 1 :], 16, channels)
            assert not is_whole_png(png[:place], 16, channels)
        assert not is_whole_png(png + b"x", 16, channels)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_a_png_whose_checksums_are_right_and_whose_pixels_are_not_is_not_whole():
    header = struct.pack(">IIBBBBB", 16, 16, 8, 2, 0, 0, 0)
    lines = (b"\0" + bytes(48)) * 16

    def png(raw: bytes, *extra: bytes, compressed: bytes | None = None) -> bytes:
        data = zlib.compress(raw) if compressed is None else compressed
        return SIGNATURE + _chunk(b"IHDR", header) + b"".join(extra) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")

    assert is_whole_png(png(lines), 16, 3)
    assert is_whole_png(png(lines, _chunk(b"tEXt", b"a\0b"), _chunk(b"gAMA", bytes(4))), 16, 3)
    wrong = [png(lines[:-1]), png(lines + b"\0"), png(b"\5" + lines[1:]), png(b"", compressed=b"nothing")]
    wrong += [png(b"", compressed=zlib.compress(lines)[:-4]), png(lines, _chunk(b"tRNS", bytes(6)))]
    wrong += [png(lines, _chunk(b"PLTE", bytes(3)))]
    for bad in wrong:
        assert not is_whole_png(bad, 16, 3)
    half = zlib.compress(lines)
    two = _chunk(b"IDAT", half[:10]), _chunk(b"IDAT", half[10:])
    start, end = SIGNATURE + _chunk(b"IHDR", header), _chunk(b"IEND", b"")
    assert is_whole_png(start + two[0] + two[1] + end, 16, 3)
    assert not is_whole_png(start + two[0] + _chunk(b"tEXt", b"a\0b") + two[1] + end, 16, 3)


def _with(file: str, row: int, picture: object = None, label: object = None) -> bytes:
    pictures, labels = rows_of(file)
    if label is None:
        pictures[row] = picture  # type: ignore[call-overload]
    else:
        labels[row] = label  # type: ignore[call-overload]
    return parquet(pictures, labels)


def _png(size: int) -> bytes:
    return encode_png(np.zeros((size, size, 3), np.uint8))


def _damaged(file: str) -> bytes:
    """Change one byte of the picture data in the last row group."""
    body = bytearray(parquet(*rows_of(file)))
    column = pq.ParquetFile(io.BytesIO(bytes(body))).metadata.row_group(1).column(0)
    body[(column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size // 2] ^= 0xFF
    return bytes(body)


FAULTS = {
    "truncated": (lambda f: parquet(*rows_of(f))[:-200], ["cannot be read"]),
    "no Parquet": (lambda f: b"<html>not found</html>", ["cannot be read"]),
    "empty": (lambda f: b"PAR1", ["cannot be read"]),
    "a damaged page": (_damaged, ["row 8 or after cannot be read"]),
    "no image column": (lambda f: parquet(*rows_of(f), column="picture"), ["no column 'image'", "picture, label"]),
    "no bytes": (lambda f: parquet([None] * 20, [0] * 20), ["row 0: no picture"]),
    "a null picture": (lambda f: _with(f, 11, None), ["row 11: no picture"]),
    "no image": (lambda f: _with(f, 12, b"hello"), ["row 12: not a picture"]),
    "half an image": (lambda f: _with(f, 13, encode_png(image_of(f, 13))[:200]), ["row 13: not a whole picture"]),
    "another size": (lambda f: _with(f, 14, _png(8)), ["row 14: the picture is 8 x 8, not 16 x 16"]),
    "a class too many": (lambda f: _with(f, 15, label=2), ["row 15: label 2", "female, male"]),
    "a negative class": (lambda f: _with(f, 15, label=-1), ["row 15: label -1"]),
    "classes in another order": (lambda f: parquet(*rows_of(f), names=["male", "female"]), ["male, female"]),
    "labels as fractions": (lambda f: parquet(rows_of(f)[0], [0.5] * 20), ["'label' is of type double"]),
    "a row too few": (lambda f: parquet(rows_of(f)[0][1:], rows_of(f)[1][1:]), ["49 rows", "train_rows=50"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_that_names_file_and_row(
    project: Project, hub: Server, one_process: None, fault: str, contents: dict[str, bytes]
):
    make, words = FAULTS[fault]
    hub.files[path_of(FILES[1])] = make(FILES[1])
    project.refused("celebahq", SETTINGS, FILES[1], *words)
    assert project.shown() == []


def test_the_run_s_record_names_no_row_of_a_bad_picture(project: Project, hub: Server, one_process: None, store: str):
    hub.files[path_of(FILES[1])] = _with(FILES[1], 17, b"hello")
    project.refused("celebahq", SETTINGS, "row 17")
    client = MlflowClient(store)
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    (newest,) = client.search_runs(ids, max_results=1, order_by=["attributes.start_time DESC"])
    assert newest.data.tags["error"] == PRIVATE_PICTURE


def test_what_was_good_before_a_fault_is_kept(
    project: Project, hub: Server, one_process: None, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    hub.files[path_of(FILES[1])] = _with(FILES[1], 17, b"hello")
    project.refused("celebahq", SETTINGS, f"{FILES[1]}, row 17")
    record = project.root / "data/.celebahq.part/rows.jsonl"
    kept = len(record.read_text().splitlines())
    assert 30 <= kept < 50
    # the second file is a good one now; the first file's pictures must not be written again
    first = project.root / "data/.celebahq.part/dataset/images/train-000000.png"
    before = first.stat().st_mtime_ns
    hub.files |= contents
    cache = Path(constants.HF_HUB_CACHE)
    for pointer in cache.rglob(Path(FILES[1]).name):
        pointer.unlink()
    assert project.prepare("celebahq", SETTINGS).exit_code == 0
    assert (project.root / "data/celebahq/images/train-000000.png").stat().st_mtime_ns == before
    dataset = read_dataset(project.root / "data/celebahq", CLASSES, "train")
    assert dataset.images([47])[0, 0, 0].tolist() == image_of(FILES[1], 17)[0, 0].tolist()


def test_a_file_that_lost_its_bytes_in_the_cache_is_named(project: Project, hub: Server, one_process: None):
    hub.files[path_of(FILES[1])] = parquet(*rows_of(FILES[1]), write_page_checksum=False)
    hub.files[path_of(TEST_FILE)] = b"no Parquet file"
    project.refused("celebahq", SETTINGS, TEST_FILE)
    blob = Path(constants.HF_HUB_CACHE) / "datasets--somebody--faces/blobs" / hub.etag(path_of(FILES[1]))
    body = bytearray(blob.read_bytes())
    body[300] ^= 1
    blob.write_bytes(body)
    hub.files[path_of(TEST_FILE)] = parquet(*rows_of(TEST_FILE))
    for pointer in Path(constants.HF_HUB_CACHE).rglob(Path(TEST_FILE).name):
        pointer.unlink()
    project.refused("celebahq", SETTINGS, FILES[1], "sha256 differs", str(blob))


def test_an_interrupted_extraction_goes_on_and_mends_what_is_not_whole(
    project: Project, hub: Server, one_process: None
):
    hub.files[path_of(FILES[1])] = _with(FILES[1], 17, b"hello")
    project.refused("celebahq", SETTINGS, "row 17")
    part = project.root / "data/.celebahq.part"
    lines = (part / "rows.jsonl").read_bytes().splitlines(keepends=True)
    # leave a torn last line, an empty picture as after a crash, and a missing picture
    (part / "rows.jsonl").write_bytes(b"".join(lines[:25]) + lines[25][:20])
    (part / "dataset/images/train-000020.png").write_bytes(b"")
    (part / "dataset/images/train-000023.png").unlink()
    project.refused("celebahq", SETTINGS, "row 17")
    again = (part / "rows.jsonl").read_bytes().splitlines(keepends=True)
    assert again == lines
    assert decode_png((part / "dataset/images/train-000020.png").read_bytes(), 16, 3)[0, 0, 1] == 20
    assert (part / "dataset/images/train-000023.png").exists()


def test_row_groups_of_any_size_and_a_start_within_one_give_the_same_rows(tmp_path: Path):
    wanted = Wanted("image", "label", tuple(CLASSES), 16, 3)
    for group in (1, 7, 1000):
        (tmp_path / "a").write_bytes(parquet(*rows_of(FILES[0]), row_group_size=group))
        file = open_file("a", tmp_path / "a", "train", wanted)
        for skip in (0, 1, 7, 8, 29, 30):
            batches = list(read_batches(file, wanted, skip))
            assert [p for b in batches for p in b.pictures] == rows_of(FILES[0])[0][skip:]
            assert [CLASSES.index(label) for b in batches for label in b.labels] == rows_of(FILES[0])[1][skip:]
            assert not batches or batches[0].first == skip


def test_labels_may_be_names_and_pictures_a_plain_column(tmp_path: Path):
    names = ["male", "female", "male"]
    table = pa.table({"jpg": pa.array([b"a", b"b", b"c"], pa.large_binary()), "sex": names})
    pq.write_table(table, tmp_path / "a")
    wanted = Wanted("jpg", "sex", tuple(CLASSES), 8, 3)
    file = open_file("a", tmp_path / "a", "train", wanted)
    (batch,) = read_batches(file, wanted, 0)
    assert (batch.pictures, batch.labels) == ([b"a", b"b", b"c"], names)


TEXTS = f"{SETTINGS} data.captions=true data.classes=[]"


@pytest.mark.parametrize("column", ["text", "prompt"])
def test_a_column_of_captions_is_taken_and_then_no_classes_are_needed(
    project: Project, hub: Server, one_process: None, column: str
):
    for file, rows in ROWS.items():
        several = [[f"{file} {row}", "a face"] if file == FILES[0] else f"{file} {row}" for row in range(rows)]
        hub.files[path_of(file)] = captioned(file, several, column)
    result = project.prepare("celebahq", TEXTS + ("" if column == "text" else f" data.caption_column={column}"))
    assert result.exit_code == 0, result.output
    folder = project.root / "data/celebahq"
    train, test = (read_dataset(folder, [], split) for split in ("train", "test"))
    assert train.captions == (
        *((f"{FILES[0]} {row}", "a face") for row in range(30)),
        *((f"{FILES[1]} {row}",) for row in range(20)),
    )
    assert test.captions == tuple((f"{TEST_FILE} {row}",) for row in range(10))
    assert not train.labels.any()
    assert train.images([35])[0, 0, 0].tolist() == image_of(FILES[1], 5)[0, 0].tolist()
    asked = len(hub.requests)
    assert (
        project.prepare("celebahq", TEXTS + ("" if column == "text" else f" data.caption_column={column}")).exit_code
        == 0
    )
    assert len(hub.requests) == asked


def test_a_stage_notes_which_pictures_of_the_hub_it_takes_and_refuses_those_of_other_settings(
    project: Project, hub: Server, one_process: None, tmp_path: Path
):
    def stage(name: str, overrides: str) -> Result:
        resolved = tmp_path / f"{name}.yaml"
        write_resolved(load("celebahq", {}, overrides), resolved)
        out = ["--resolved", str(resolved), "--out", str(tmp_path / name)]
        return CliRunner().invoke(prepare, ["--part", "private", *out])

    missing = stage("missing", SETTINGS)
    assert missing.exit_code == 1
    assert "data/celebahq: missing; type" in missing.stderr
    assert project.prepare("celebahq", SETTINGS).exit_code == 0
    hub.requests.clear()
    assert stage("right", SETTINGS).exit_code == 0
    digest = digest_file(project.root / "data/celebahq/source.json")
    assert read_json(tmp_path / "right/pictures.json") == {
        "folder": str(project.root / "data/celebahq"),
        "digest": digest,
    }
    other = stage("other", SETTINGS.replace(REVISION, "f" * 40))
    assert other.exit_code == 1
    assert "was prepared with another huggingface section" in other.stderr
    assert not (tmp_path / "other").exists()
    assert hub.requests == []


@pytest.mark.parametrize(
    ("captions", "words"),
    [
        (None, f"{FILES[0]}: no column 'text'; it has image"),
        (list(range(30)), "column 'text' is of type int64; texts, or lists of texts, are expected"),
        (["a"] * 11 + [None] + ["a"] * 18, f"{FILES[0]}, row 11: no caption in column 'text'"),
        ([["a"]] * 29 + [[" "]], f"{FILES[0]}, row 29: no caption in column 'text'"),
    ],
)
def test_a_caption_that_is_missing_is_named_by_file_and_row(
    project: Project, hub: Server, one_process: None, captions: list | None, words: str
):
    for file in (*FILES, TEST_FILE):
        hub.files[path_of(file)] = captioned(file, captions if file == FILES[0] else ["a"] * ROWS[file])
    project.refused("celebahq", TEXTS, words)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(project: Project, hub: Server):
    images = project.root / "data/.celebahq.part/dataset/images"
    hub.files[path_of(FILES[1])] = _with(FILES[1], 17, b"hello")
    project.refused("celebahq", SETTINGS, "row 17")
    # make every write to this picture fail as on a full disk
    record = project.root / "data/.celebahq.part/rows.jsonl"
    record.write_bytes(b"".join(record.read_bytes().splitlines(keepends=True)[:22]))
    (images / "train-000025.png").unlink()
    (images / "train-000025.png").symlink_to("/dev/full")
    line = project.refused("celebahq", SETTINGS, f"{FILES[0]}, row 25", "No space left on device", "make room")
    assert "goes on" in line
    # the record calls no later picture finished
    assert len(record.read_text().splitlines()) == 24
    (images / "train-000025.png").unlink()
    project.refused("celebahq", SETTINGS, "row 17")
    assert not multiprocessing.active_children()


def test_a_disk_that_is_too_small_is_seen_before_it_starts(project: Project, hub: Server, one_process: None):
    line = project.refused(
        "celebahq", SETTINGS.replace("size=100000", f"size={10**17}"), "100000000.0 GB needed", "free"
    )
    assert "make room" in line
    assert not downloads(hub)


def test_a_folder_that_cannot_be_written_is_one_line(project: Project, hub: Server, one_process: None):
    (project.root / "data").write_text("a file in the place of the folder")
    project.refused("celebahq", SETTINGS, "data")


def test_two_at_a_time_on_one_folder_are_refused(project: Project, hub: Server, one_process: None):
    from dp_lora.files import exclusive

    with exclusive(project.root / "data/.celebahq.lock"):
        project.refused("celebahq", SETTINGS, "another process")


def test_the_token_is_sent_and_its_want_is_one_line(project: Project, hub: Server, one_process: None, monkeypatch):
    hub.token = "hf_secret"
    line = project.refused("celebahq", SETTINGS, FILES[0], "HF_TOKEN")
    assert "secret" not in line
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert project.prepare("celebahq", SETTINGS).exit_code == 0


def test_a_missing_file_is_one_line(project: Project, hub: Server, one_process: None):
    del hub.files[path_of(TEST_FILE)]
    project.refused("celebahq", SETTINGS, TEST_FILE, "no such file")


def test_offline_the_cache_is_used_and_its_gaps_are_one_line(
    project: Project, hub: Server, one_process: None, monkeypatch
):
    hub.files[path_of(FILES[1])] = _with(FILES[1], 17, b"hello")
    project.refused("celebahq", SETTINGS, "row 17")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    project.refused("celebahq", SETTINGS, "row 17")
    other = SETTINGS.replace(TEST_FILE, "data/other.parquet")
    project.refused("celebahq", other, "data/other.parquet", "HF_HUB_OFFLINE")
    assert not hub.requests


def test_a_broken_transfer_is_resumed_by_the_client(project: Project, hub: Server, one_process: None, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    hub.cut = [1000]
    assert project.prepare("celebahq", SETTINGS).exit_code == 0
    ranges = [asked for method, path, asked in hub.requests if method == "GET" and path.endswith(FILES[0])]
    assert ranges == [None, "bytes=1000-"]


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ("huggingface.revision=main", "40 hex digits"),
        ("huggingface.repo=null", "huggingface.repo"),
        ("data.folder=null", "data.folder"),
        ("data.folder=/tmp/x", "data/NAME"),
        ("data.folder=data/../x", "data/NAME"),
        ("data.folder=data/cin256", "must differ"),
        ("checkpoint.url=null", "go together"),
        ("data.mirror=http://127.0.0.1", "data.source is huggingface"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(overrides: str, part: str):
    with pytest.raises(ValueError, match=part):
        load("celebahq", {}, overrides)


def test_the_config_names_the_published_dataset():
    config = load("celebahq")
    assert config.huggingface.repo == "korexyz/celeba-hq-256x256"
    assert len(config.huggingface.train_files or []) == 6
    assert (config.huggingface.train_rows, config.huggingface.test_rows) == (28000, 2000)
    assert (list(config.data.classes), config.data.size, config.data.channels) == (CLASSES, 256, 3)
    assert os.path.basename(config.checkpoint.url or "") == "cin.zip"
