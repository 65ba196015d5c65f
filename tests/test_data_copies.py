"""Identical pictures are counted and named on the terminal alone, or refused before the dataset is in its place."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from dp_lora.data.copies import GROUPS, check_copies, identical_pictures
from dp_lora.data.layout import Picture, write_dataset
from dp_lora.data.png import encode_png
from dp_lora.errors import PRIVATE_PICTURE, InputError
from dp_lora.events import Events

SIZE = 8


def _png(number: int) -> bytes:
    return encode_png(np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 1), np.uint8))


def _set(folder: Path, *rows: tuple[str, str, str, int], check=None, persons: dict[str, str] | None = None) -> Path:
    """Write a dataset of rows (file name, label, split, number of the picture)."""
    owner = persons or {}
    pictures = [Picture(name, label, split, _png(number), owner.get(name)) for name, label, split, number in rows]
    write_dataset(folder, pictures, {}, SIZE, 1, packed=True, check=check)
    return folder


COPIES = (
    ("a.png", "cat", "train", 1),
    ("b.png", "cat", "train", 2),
    ("c.png", "dog", "test", 1),
    ("d.png", "cat", "train", 1),
    ("e.png", "dog", "train", 3),
    ("f.png", "dog", "test", 3),
    ("g.png", "dog", "test", 4),
    ("h.png", "dog", "test", 4),
)


def test_copies_are_counted_in_training_across_the_split_and_across_classes(tmp_path: Path, capsys) -> None:
    folder = _set(tmp_path / "set", *COPIES)
    assert [[row["file_name"] for row in group] for group in identical_pictures(folder)] == [
        ["a.png", "c.png", "d.png"],
        ["e.png", "f.png"],
        ["g.png", "h.png"],
    ]
    check_copies(folder, "warn", Events())
    out, err = capsys.readouterr()
    assert out == ""
    assert "7 pictures in 3 groups (1 in training, 2 across the split, 1 across classes)" in err
    assert "'a.png' (cat, train) = 'c.png' (dog, test) = 'd.png' (cat, train)" in err
    assert "b.png" not in err


def test_pictures_that_differ_are_not_spoken_of(tmp_path: Path, capsys) -> None:
    folder = _set(tmp_path / "set", *((f"{n}.png", "cat", "train", n) for n in range(20)))
    for duplicates in ("warn", "refuse"):
        check_copies(folder, duplicates, Events())
    assert capsys.readouterr() == ("", "")


def test_copies_of_several_persons_are_told_from_those_of_one(tmp_path: Path, capsys) -> None:
    rows = [(f"{n}.png", "cat", "train", n // 2) for n in range(4)]
    _set(
        tmp_path / "set",
        *rows,
        check=partial(check_copies, duplicates="warn", events=Events()),
        persons={"0.png": "Ann", "1.png": "Ann", "2.png": "Bo", "3.png": "Cy"},
    )
    err = capsys.readouterr().err
    assert "4 pictures in 2 groups (2 in training, 0 across the split, 0 across classes, 1 across persons)" in err
    assert "'2.png' (cat, Bo, train) = '3.png' (cat, Cy, train)" in err


def test_refused_copies_leave_the_older_dataset_and_no_name_for_the_record(tmp_path: Path) -> None:
    folder = _set(tmp_path / "set", ("old.png", "cat", "train", 9))
    with pytest.raises(InputError) as caught:
        _set(folder, *COPIES, check=partial(check_copies, duplicates="refuse", events=Events()))
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert "data.duplicates=refuse: 7 pictures in 3 groups" in message
    assert "'g.png' (dog, test) = 'h.png' (dog, test)" in message
    assert caught.value.public == PRIVATE_PICTURE
    assert not re.search(r"\d|\.png", PRIVATE_PICTURE)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert identical_pictures(folder) == []


def test_of_many_copies_the_first_few_are_named_and_the_rest_counted(tmp_path: Path, capsys) -> None:
    folder = _set(tmp_path / "set", *((f"{n}.png", "cat", "train", n % 100) for n in range(1000)))
    check_copies(folder, "warn", Events())
    lines = capsys.readouterr().err.splitlines()
    assert "1000 pictures in 100 groups (100 in training" in lines[0]
    assert len(lines) == 1 + GROUPS + 1
    assert lines[1].endswith("'300.png' (cat, train) = 6 more")
    assert lines[-1].strip() == f"and {100 - GROUPS} more"
