"""The functions that the entry point prepare calls write the datasets that a config names."""

from pathlib import Path

import pytest
from PIL import Image

from dp_lora.config import Config, load
from dp_lora.data import letters
from dp_lora.data.layout import read_dataset
from dp_lora.data.prepare import check_prepared, prepare_private, prepare_public
from dp_lora.errors import InputError
from dp_lora.events import Events
from dp_lora.files import digest_folder, read_json


def test_public_letters_follow_the_config_and_its_seed(tmp_path: Path) -> None:
    overrides = "public.n=60 public.classes=[H,O,X] public.size=16 public.channels=3"
    config = load("mnist5k", {"seed": "3"}, overrides)
    for name in ("one", "two"):
        prepare_public(config, tmp_path / name, Events())
    assert digest_folder(tmp_path / "one") == digest_folder(tmp_path / "two")
    dataset = read_dataset(tmp_path / "one", config.public.classes, "train")
    assert dataset.images([0, 59]).shape == (2, 16, 16, 3)
    assert dataset.labels.tolist() == [0, 1, 2] * 20
    assert {"name", "origin", "licence", "seed"} <= read_json(tmp_path / "one/dataset.json")["source"].keys()
    prepare_public(load("mnist5k", {"seed": "4"}, overrides), tmp_path / "two", Events())
    assert digest_folder(tmp_path / "one") != digest_folder(tmp_path / "two")


@pytest.mark.parametrize(("name", "train", "test"), [("mnist5k", 4000, 1000), ("standin", 40, 20)])
def test_digits_are_balanced_on_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, train: int, test: int
) -> None:
    monkeypatch.setattr(letters, "STANDIN_TRAIN", 40)
    monkeypatch.setattr(letters, "STANDIN_TEST", 20)
    config = load(name)
    prepare_private(config, tmp_path / "set", Events())
    for split, n in (("train", train), ("test", test)):
        labels = read_dataset(tmp_path / "set", config.data.classes, split).labels.tolist()
        assert [labels.count(label) for label in range(10)] == [n // 10] * 10


def test_the_stand_in_is_one_dataset_whatever_the_seed_of_the_training_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a fine-tuning with another seed would log its own seed, but train on the digits of the prepared one."""
    monkeypatch.setattr(letters, "STANDIN_TRAIN", 20)
    monkeypatch.setattr(letters, "STANDIN_TEST", 10)
    for seed in ("0", "4"):
        prepare_private(load("standin", {"seed": seed}), tmp_path / seed, Events())
    assert digest_folder(tmp_path / "0") == digest_folder(tmp_path / "4")


def test_a_folder_of_persons_becomes_png_files_with_persons(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    lines = ["file_name,label,person"]
    for number in range(20):
        Image.new("L", (9, 9), number).save(mine / f"{number}.png")
        lines.append(f"{number}.png,{'ab'[number % 2]},p{number // 2}")
    (mine / "metadata.csv").write_text("\n".join(lines))
    overrides = f"data.path={mine} data.classes=[a,b] data.n_public=20000 data.size=8 privacy.unit=person"
    config = load("folder", {}, overrides + " privacy.delta=1e-6")
    prepare_private(config, tmp_path / "set", Events())
    assert (tmp_path / "set/images/0.png").exists()
    dataset = read_dataset(tmp_path / "set", ["a", "b"], "train")
    for row in range(len(dataset)):
        number = int(dataset.images([row])[0, 0, 0, 0])
        assert dataset.persons is not None
        assert (dataset.persons[row], dataset.labels[row]) == (f"p{number // 2}", number % 2)


class Kept(Events):
    """Keeps the lines that a tracking store would keep."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


def test_copies_are_named_on_the_terminal_alone_or_refused_before_and_after_the_dataset_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for number in range(6):
        for label in ("cat", "dog"):
            (tmp_path / "mine" / label).mkdir(parents=True, exist_ok=True)
            # the last dog is the first cat in another format: conversion makes them equal
            value = 0 if (label, number) == ("dog", 5) else 100 * (label == "dog") + number
            kind = "bmp" if (label, number) == ("dog", 5) else "png"
            Image.new("L", (9, 9), value).save(tmp_path / f"mine/{label}/maria{number}.{kind}")

    def config(duplicates: str) -> Config:
        common = f"data.path={tmp_path / 'mine'} data.classes=[cat,dog] data.n_public=16 privacy.batch_size=4"
        return load("folder", {}, f"{common} data.size=8 data.duplicates={duplicates}")

    with pytest.raises(InputError, match=r"refuse: 2 pictures in 1 group.*'cat/maria0.png'.*'dog/maria5.bmp.png'"):
        prepare_private(config("refuse"), tmp_path / "set", Kept())
    assert not (tmp_path / "set").exists()
    kept = Kept()
    prepare_private(config("warn"), tmp_path / "set", kept)
    assert "'cat/maria0.png'" in capsys.readouterr().err
    assert kept.lines == [f"folder: written to {tmp_path / 'set'}"]
    check_prepared(config("warn"), tmp_path / "set")
    with pytest.raises(InputError, match=r"'cat/maria0.png'") as caught:
        check_prepared(config("refuse"), tmp_path / "set")
    assert "maria" not in caught.value.public
    (tmp_path / "mine/dog/maria5.bmp").unlink()
    prepare_private(config("refuse"), tmp_path / "set", Kept())
    check_prepared(config("refuse"), tmp_path / "set")


def test_sources_without_persons_refuse_the_unit_person(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"privacy\.unit=person: the source mnist5k knows no persons"):
        prepare_private(load("mnist5k", {}, "privacy.unit=person"), tmp_path / "set", Events())
    assert not list(tmp_path.iterdir())


def test_a_dataset_of_another_folder_or_unit_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        for label in ("cat", "dog"):
            (tmp_path / name / label).mkdir(parents=True)
            for number in range(8):
                Image.new("L", (32, 32), number).save(tmp_path / name / label / f"{number}.png")

    def config(path: str, more: str = "") -> Config:
        common = f"data.path={tmp_path / path} data.classes=[cat,dog] data.n_public=16 privacy.batch_size=4"
        return load("folder", {}, f"{common} {more}")

    prepare_private(config("one"), tmp_path / "set", Events())
    check_prepared(config("one", "privacy.eps=3"), tmp_path / "set")
    for other in (config("two"), config("one", "privacy.unit=person")):
        with pytest.raises(InputError, match=r"prepared with another data\.source, data\.path"):
            check_prepared(other, tmp_path / "set")
