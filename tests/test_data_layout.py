"""The one dataset layout: a picture comes out with its own label, split and name; other files are refused by name."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dp_lora.data.layout import Picture, read_dataset, safe_name, write_dataset
from dp_lora.data.png import encode_png
from dp_lora.errors import PRIVATE_PICTURE, InputError
from dp_lora.files import digest_folder

CLASSES = ["a", "b", "c"]
SIZE, CHANNELS, N = 8, 3, 24


def _picture(number: int, person: bool = False) -> Picture:
    """A picture whose first pixel holds its number; the number gives class and split."""
    image = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, CHANNELS), np.uint8)
    image[0, 0] = number
    split = "test" if number % 4 == 3 else "train"
    owner = f"p{number % 5}" if person else None
    return Picture(f"{number:03d}.png", CLASSES[number % 3], split, encode_png(image), owner)


def _write(folder: Path, packed: bool, person: bool = False, n: int = N) -> Path:
    write_dataset(folder, (_picture(i, person) for i in range(n)), {"name": "made"}, SIZE, CHANNELS, packed)
    return folder


def _together(folder: Path) -> bool:
    """Whether every picture of both splits carries its own label, split, name and index."""
    held = True
    for split in ("train", "test"):
        dataset = read_dataset(folder, CLASSES, split)
        numbers = dataset.images(slice(None))[:, 0, 0, 0].tolist()
        held &= numbers == [n for n in range(N) if (n % 4 == 3) == (split == "test")]
        held &= dataset.labels.tolist() == [n % 3 for n in numbers] and dataset.index.tolist() == numbers
        held &= dataset.file_names == [f"{n:03d}.png" for n in numbers]
    return held


def _edit(path: Path, change: dict) -> None:
    table = pq.read_table(path)
    for name, values in change.items():
        column = table.column_names.index(name)
        table = table.set_column(column, table.schema.field(name), pa.array(values, table.schema.field(name).type))
    pq.write_table(table, path)


@pytest.mark.parametrize("packed", [True, False])
def test_label_and_image_stay_together_through_the_layout(tmp_path: Path, packed: bool) -> None:
    folder = _write(tmp_path / "set", packed)
    assert _together(folder)
    labels = pq.read_table(folder / "metadata.parquet")["label"].to_pylist()
    _edit(folder / "metadata.parquet", {"label": labels[1:] + labels[:1]})  # the mutant: labels shifted by one
    assert not _together(folder)


@pytest.mark.parametrize("packed", [True, False])
def test_a_shifted_or_exchanged_picture_is_refused_by_name(tmp_path: Path, packed: bool) -> None:
    folder = _write(tmp_path / "set", packed)
    if packed:
        images = pq.read_table(folder / "images.parquet")["image"].to_pylist()
        _edit(folder / "images.parquet", {"image": images[1:] + images[:1]})
    else:
        (folder / "images/000.png").write_bytes((folder / "images/001.png").read_bytes())
    with pytest.raises(InputError, match=r"'000.png' cannot be read: its bytes are not the ones that were written"):
        read_dataset(folder, CLASSES, "train").images([0])


@pytest.mark.parametrize("packed", [True, False])
def test_pixels_survive_the_layout_bit_for_bit_in_any_order(tmp_path: Path, packed: bool) -> None:
    dataset = read_dataset(_write(tmp_path / "set", packed), CLASSES, "test")
    images = dataset.images([4, 0, 4])
    assert images.shape == (3, SIZE, SIZE, CHANNELS)
    for image, number in zip(images, (19, 3, 19), strict=True):
        expected = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, CHANNELS), np.uint8)
        expected[0, 0] = number
        np.testing.assert_array_equal(image, expected)
    assert dataset.images([]).shape == (0, SIZE, SIZE, CHANNELS)


@pytest.mark.parametrize("packed", [True, False])
def test_equal_pictures_give_equal_bytes(tmp_path: Path, packed: bool) -> None:
    first, second = _write(tmp_path / "one", packed), _write(tmp_path / "two", packed)
    assert digest_folder(first) == digest_folder(second)


def test_digest_is_of_the_split_and_of_every_picture_in_it(tmp_path: Path) -> None:
    folder = _write(tmp_path / "one", True)
    train, test = (read_dataset(folder, CLASSES, split).digest() for split in ("train", "test"))
    assert train != test
    assert read_dataset(_write(tmp_path / "two", False), CLASSES, "train").digest() == train
    pictures = [_picture(i) for i in range(N)]
    pictures[0] = Picture("000.png", "a", "train", _picture(23).png)
    write_dataset(tmp_path / "three", pictures, {}, SIZE, CHANNELS, True)
    assert read_dataset(tmp_path / "three", CLASSES, "train").digest() != train
    assert read_dataset(tmp_path / "three", CLASSES, "test").digest() == test


def test_labels_are_positions_in_the_class_list_given(tmp_path: Path) -> None:
    folder = _write(tmp_path / "set", True)
    assert read_dataset(folder, ["c", "b", "a"], "train").labels.tolist()[:3] == [2, 1, 0]
    with pytest.raises(InputError, match=r"'002.png' is of class 'c', which is not in the class list"):
        read_dataset(folder, ["a", "b"], "train")


def test_persons_come_back_with_their_pictures(tmp_path: Path) -> None:
    dataset = read_dataset(_write(tmp_path / "set", True, person=True), CLASSES, "test")
    assert dataset.persons == [f"p{n % 5}" for n in dataset.index]
    assert read_dataset(_write(tmp_path / "bare", True), CLASSES, "test").persons is None


def _captioned(number: int, *captions: str, label: str | None = "a") -> Picture:
    return Picture(**{**vars(_picture(number)), "label": label, "captions": captions or None})


@pytest.mark.parametrize("packed", [True, False])
def test_one_caption_or_several_come_back_with_their_pictures(tmp_path: Path, packed: bool) -> None:
    pictures = [
        _captioned(0, "a cat"),
        _captioned(1, "a dog, \u732b", "a\ndog"),
        _captioned(2, "x"),
        _captioned(3, "y"),
    ]
    write_dataset(tmp_path / "set", pictures, {}, SIZE, CHANNELS, packed)
    assert read_dataset(tmp_path / "set", ["a"], "train").captions == (("a cat",), ("a dog, \u732b", "a\ndog"), ("x",))
    assert read_dataset(tmp_path / "set", ["a"], "test").captions == (("y",),)
    assert read_dataset(_write(tmp_path / "bare", packed), CLASSES, "train").captions is None


def test_pictures_with_captions_need_no_classes(tmp_path: Path) -> None:
    pictures = [_captioned(n, f"caption {n}", label=None) for n in range(4)]
    write_dataset(tmp_path / "set", pictures, {}, SIZE, CHANNELS, packed=True)
    dataset = read_dataset(tmp_path / "set", [], "train")
    assert (dataset.classes, dataset.labels.tolist(), dataset.labels.dtype) == ([], [0, 0, 0], np.int64)
    assert dataset.captions == (("caption 0",), ("caption 1",), ("caption 2",))
    with pytest.raises(InputError, match="no column 'label'"):
        read_dataset(tmp_path / "set", CLASSES, "train")
    with pytest.raises(InputError, match="has classes, and the config lists none"):
        read_dataset(_write(tmp_path / "classes", True), [], "train")


def test_a_changed_caption_changes_the_digest_of_its_split_alone(tmp_path: Path) -> None:
    digests = []
    for number, caption in enumerate(["one", "two"]):
        pictures = [_captioned(0, caption), _captioned(3, "the same")]
        write_dataset(tmp_path / str(number), pictures, {}, SIZE, CHANNELS, packed=True)
        digests.append([read_dataset(tmp_path / str(number), ["a"], split).digest() for split in ("train", "test")])
    assert digests[0][0] != digests[1][0]
    assert digests[0][1] == digests[1][1]


def test_datasets_without_captions_are_the_bytes_that_they_were(tmp_path: Path) -> None:
    folder = _write(tmp_path / "set", packed=True)
    table = pq.read_table(folder / "metadata.parquet")
    columns = table.column_names
    assert columns == ["index", "file_name", "label", "split", "sha256"]
    # this digest must never change: ledgers and caches of latents keep it
    lines = [[1, SIZE, CHANNELS]]
    for row in table.to_pylist():
        if row["split"] == "train":
            lines.append([row["index"], row["file_name"], row["label"], row["sha256"], None])
    text = json.dumps(lines[0]) + "".join(json.dumps(line) + "\n" for line in lines[1:])
    assert read_dataset(folder, CLASSES, "train").digest() == hashlib.sha256(text.encode()).hexdigest()
    with_persons = pq.read_table(_write(tmp_path / "persons", True, person=True) / "metadata.parquet")
    assert with_persons.column_names == [*columns, "person"]


@pytest.mark.parametrize("captions", [None, (), ("",), ("fine", " ")])
def test_a_caption_missing_beside_others_is_refused_by_name(tmp_path: Path, captions: tuple[str, ...] | None) -> None:
    bad = Picture(**{**vars(_captioned(1)), "captions": captions})
    with pytest.raises(InputError, match=r"'001.png': .*caption") as caught:
        write_dataset(tmp_path / "set", [_captioned(0, "a cat"), bad], {}, SIZE, CHANNELS, False)
    assert caught.value.public == PRIVATE_PICTURE


@pytest.mark.parametrize("captions", [["a"] * 3, [["a"], [], ["b"]], [["a"], None, ["b"]], [["a"], [None], ["b"]]])
def test_a_column_that_is_no_lists_of_captions_is_refused(tmp_path: Path, captions: list) -> None:
    write_dataset(tmp_path / "set", [_picture(n) for n in range(3)], {}, SIZE, CHANNELS, True)
    path = tmp_path / "set/metadata.parquet"
    pq.write_table(pq.read_table(path).append_column("caption", pa.array(captions)), path)
    with pytest.raises(InputError, match="column 'caption' is no lists of texts without gaps"):
        read_dataset(tmp_path / "set", CLASSES, "train")


def test_a_failed_write_leaves_the_older_dataset_whole(tmp_path: Path) -> None:
    folder = _write(tmp_path / "set", False)
    before = digest_folder(folder)

    def broken():
        yield _picture(0)
        raise InputError("bad.png: not readable")

    with pytest.raises(InputError, match=r"bad\.png"):
        write_dataset(folder, broken(), {}, SIZE, CHANNELS, False)
    assert digest_folder(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file_name": "../out.png"}, "not a relative file name"),
        ({"file_name": "/out.png"}, "not a relative file name"),
        ({"file_name": "000.png"}, "two pictures of this name"),
        ({"file_name": "x" * 300 + ".png"}, "cannot be written"),
        ({"split": "dev"}, "must be one of train, test"),
        ({"person": "p"}, "give every picture a person, or none"),
    ],
)
def test_a_bad_picture_is_refused_by_name_while_writing(tmp_path: Path, change: dict, message: str) -> None:
    bad = Picture(**{**vars(_picture(1)), **change})
    with pytest.raises(InputError, match=message) as caught:
        write_dataset(tmp_path / "set", [_picture(0), bad], {}, SIZE, CHANNELS, False)
    assert repr(bad.file_name) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_two_spellings_of_a_person_are_refused_while_writing_whatever_the_source(tmp_path: Path) -> None:
    pictures = [Picture(**{**vars(_picture(n)), "person": person}) for n, person in enumerate(["Ann", "Bo", "ann"])]
    with pytest.raises(InputError, match=r"'000.png' 'Ann', '002.png' 'ann'"):
        write_dataset(tmp_path / "set", pictures, {}, SIZE, CHANNELS, False)
    assert list(tmp_path.iterdir()) == []


def _spoil_metadata(folder: Path) -> None:
    (folder / "metadata.parquet").write_bytes(b"PAR1 not a table")


def _spoil_index(folder: Path) -> None:
    _edit(folder / "metadata.parquet", {"index": list(range(N))[::-1]})


def _spoil_label(folder: Path) -> None:
    _edit(folder / "metadata.parquet", {"label": [None] * N})


def _spoil_person(folder: Path) -> None:
    table = pq.read_table(folder / "metadata.parquet")
    pq.write_table(table.append_column("person", pa.array(range(N))), folder / "metadata.parquet")


def _spoil_format(folder: Path) -> None:
    (folder / "dataset.json").write_text(json.dumps({"format": 99}))


def _spoil_json(folder: Path) -> None:
    (folder / "dataset.json").write_text("{")


def _remove_json(folder: Path) -> None:
    (folder / "dataset.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "file"),
    [
        (_spoil_metadata, "metadata.parquet"),
        (_spoil_index, "metadata.parquet"),
        (_spoil_label, "metadata.parquet"),
        (_spoil_person, "metadata.parquet"),
        (_spoil_format, "dataset.json"),
        (_spoil_json, "dataset.json"),
        (_remove_json, "dataset.json"),
    ],
)
def test_a_spoilt_dataset_is_one_line_that_names_the_file(tmp_path: Path, spoil, file: str) -> None:
    folder = _write(tmp_path / "set", True)
    spoil(folder)
    with pytest.raises(InputError) as caught:
        read_dataset(folder, CLASSES, "train")
    assert str(folder / file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pictures_that_are_cut_missing_or_of_another_size_are_refused_by_name(tmp_path: Path) -> None:
    folder = _write(tmp_path / "set", False)
    (folder / "images/001.png").write_bytes(b"")
    (folder / "images/002.png").unlink()
    dataset = read_dataset(folder, CLASSES, "train")
    for row, name in ((1, "001.png"), (2, "002.png")):
        with pytest.raises(InputError, match=f"'{name}' cannot be read"):
            dataset.images([row])
    small = Picture("small.png", "a", "train", encode_png(np.zeros((4, 4, CHANNELS), np.uint8)))
    write_dataset(tmp_path / "other", [small], {}, SIZE, CHANNELS, True)
    with pytest.raises(InputError, match=r"'small.png' cannot be read: is 4 x 4 RGB, not 8 x 8 RGB"):
        read_dataset(tmp_path / "other", CLASSES, "train").images([0])


def test_a_table_that_points_out_of_the_folder_reads_nothing(tmp_path: Path) -> None:
    folder = _write(tmp_path / "set", False)
    (folder / "images/000.png").rename(tmp_path / "out.png")
    names = pq.read_table(folder / "metadata.parquet")["file_name"].to_pylist()
    _edit(folder / "metadata.parquet", {"file_name": ["../../out.png", *names[1:]]})
    with pytest.raises(InputError, match="its name leaves the folder"):
        read_dataset(folder, CLASSES, "train").images([0])


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    folder = _write(tmp_path / "set", True, n=2)
    with pytest.raises(InputError, match="no pictures in split 'test'"):
        read_dataset(folder, CLASSES, "test")


def test_safe_names_stay_below_their_folder() -> None:
    assert all(safe_name(name) for name in ("a.png", "a/b.png", "..a", "a..b/.c"))
    assert not any(safe_name(name) for name in ("", "/a", "..", "a/../b", "a//b", "./a", "a/", "a\0b"))


def test_pictures_of_another_shape_than_the_config_says_are_refused_in_one_line(tmp_path: Path) -> None:
    dataset = read_dataset(_write(tmp_path / "set", packed=True), CLASSES, "train")
    dataset.require_shape(SIZE, CHANNELS, "public")
    for size, channels in ((SIZE, 1), (16, CHANNELS)):
        with pytest.raises(InputError, match=f"public.size={size} and public.channels={channels}; prepare"):
            dataset.require_shape(size, channels, "public")
