"""Captions of a user's own pictures: found where people put them, kept whole, and shown on the terminal alone."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dp_lora.config import Config, load
from dp_lora.config.prompts import drawn_prompts
from dp_lora.data.captions import texts_of
from dp_lora.data.fingerprint import fingerprint
from dp_lora.data.folder import folder_pictures
from dp_lora.data.layout import read_dataset
from dp_lora.data.metadata_table import Stated
from dp_lora.data.prepare import check_prepared, prepare_private
from dp_lora.errors import PRIVATE_PICTURE, InputError
from dp_lora.events import Events

TEXT = Stated((), captions=True)
CLASSES = Stated(("cat", "dog"))
NAMES = (
    "0.png",
    "a.png.crop.png",
    "two words.jpg",
    "n\u00e4he \u732b.webp",
    "UPPER.PNG",
    "two\nlines.png",
    "noending.bmp",
)


class Told(Events):
    """Keeps the lines that the terminal shows, and the lines that a store would keep."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.kept: list[str] = []

    def terminal(self, text: str) -> None:
        self.shown.append(text)

    def message(self, text: str) -> None:
        self.kept.append(text)


def _save(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), value).save(path)
    return path


def _captions(folder: Path, stated: Stated = TEXT, events: Events | None = None) -> dict[str, tuple[str, ...] | None]:
    pictures = folder_pictures(folder, stated, 8, 1, events or Told())
    return {p.file_name: p.captions for p in pictures}


def _refused(folder: Path, *words: str, stated: Stated = TEXT) -> str:
    with pytest.raises(InputError) as caught:
        _captions(folder, stated)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for word in words:
        assert word in message
    assert "secret" not in message
    assert caught.value.public == PRIVATE_PICTURE
    return message


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Two pictures of cats and one dog in class folders, each with a caption beside it."""
    for name in ("cat/0.png", "cat/1.jpg", "dog/0.png"):
        path = _save(tmp_path / "mine" / name, len(name))
        path.with_suffix(".txt").write_text(f"a photo of {name}\n", encoding="utf-8")
    return tmp_path / "mine"


def _table(folder: Path, form: str, rows: list[dict]) -> None:
    path = folder / f"metadata.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif form == "jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        lines = [",".join(rows[0]), *(",".join('"' + v.replace('"', '""') + '"' for v in r.values()) for r in rows)]
        path.write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_a_caption_lies_beside_its_picture_under_its_name(tmp_path: Path, name: str) -> None:
    path = _save(tmp_path / "mine" / "some folder" / name)
    text = path.with_name(name.rpartition(".")[0] + ".txt")
    text.write_bytes("\ufeff  a cat, on a mat \r\n".encode())
    stored = f"some folder/{name}" + ("" if name.endswith(".png") else ".png")
    assert _captions(tmp_path / "mine") == {stored: ("a cat, on a mat",)}


def test_each_line_is_a_caption_and_empty_lines_are_none(tmp_path: Path) -> None:
    _save(tmp_path / "mine/0.png").with_suffix(".txt").write_text("one\n\n  \ntwo\x0bthree\n")
    assert _captions(tmp_path / "mine") == {"0.png": ("one", "two\x0bthree")}


def test_classes_and_captions_go_together(mine: Path) -> None:
    stated = Stated(("cat", "dog"), captions=True)
    found = {p.file_name: (p.label, p.captions) for p in folder_pictures(mine, stated, 8, 1, Told())}
    assert found["cat/1.jpg.png"] == ("cat", ("a photo of cat/1.jpg",))


def test_a_base_of_classes_keeps_captions_and_the_terminal_says_that_it_does_not_use_them(mine: Path) -> None:
    told = Told()
    assert _captions(mine, CLASSES, told)["dog/0.png"] == ("a photo of dog/0.png",)
    assert [line for line in told.shown if "captions: 3 pictures have them; kept, but not trained on" in line]
    assert not told.kept
    (mine / "dog/0.txt").unlink()
    told = Told()
    assert set(_captions(mine, CLASSES, told).values()) == {None}
    assert [line for line in told.shown if "only 2 of 3 pictures have them; not kept" in line]


def test_how_many_captions_are_used_is_told_on_the_terminal_alone(mine: Path) -> None:
    (mine / "dog/0.txt").write_text("one\ntwo")
    told = Told()
    _captions(mine, TEXT, told)
    assert "captions: 4, of 3 pictures" in told.shown
    assert not told.kept


@pytest.mark.parametrize("text", [None, "", " \n\n"])
def test_a_picture_without_its_caption_is_refused_by_name(mine: Path, text: str | None) -> None:
    for name in ("cat/0.txt", "dog/0.txt"):
        (mine / name).unlink() if text is None else (mine / name).write_text(text)
    _refused(mine, "no caption: 'cat/0.png', 'dog/0.png'; write each into NAME.txt beside NAME.png")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("cat/2.txt", b"secret", "a caption without its picture"),
        ("cat/0.png.txt", b"secret", "a caption without its picture"),
        ("cat/0.TXT", b"secret", "a caption without its picture"),
        ("cat/0.caption", b"secret", "captions are read from NAME.txt"),
        ("cat/0.txt", "secret".encode("utf-16"), "not UTF-8"),
        ("cat/0.txt", b"secret " * 10000, "longer than a caption is"),
    ],
)
def test_a_bad_caption_is_refused_by_name_and_never_shown(mine: Path, name: str, content: bytes, reason: str) -> None:
    (mine / name).write_bytes(content)
    _refused(mine, f"mine/{name}", reason)


def test_a_caption_that_leads_out_of_the_folder_is_refused(mine: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.txt").write_text("secret")
    (mine / "cat/0.txt").unlink()
    (mine / "cat/0.txt").symlink_to(tmp_path / "elsewhere.txt")
    _refused(mine, "cat/0.txt", "leads out of the folder")
    (mine / "cat/0.txt").unlink()
    (mine / "cat/0.txt").symlink_to("nowhere.txt")
    _refused(mine, "cat/0.txt", "cannot be read")


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_a_table_names_pictures_captions_classes_and_persons(mine: Path, form: str) -> None:
    rows = [
        {"file_name": "cat/0.png", "text": 'a "cat", on a mat', "label": "cat", "person": "Ann"},
        {"file_name": "dog/0.png", "text": "ein Hund \u732b", "label": "dog", "person": "Bo"},
    ]
    _table(mine, form, rows)
    stated = Stated(("cat", "dog"), by_person=True, captions=True)
    pictures = [(p.file_name, p.captions, p.label, p.person) for p in folder_pictures(mine, stated, 8, 1, Told())]
    assert pictures == [
        ("cat/0.png", ('a "cat", on a mat',), "cat", "Ann"),
        ("dog/0.png", ("ein Hund \u732b",), "dog", "Bo"),
    ]


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_a_table_of_captions_needs_neither_classes_nor_persons(mine: Path, form: str) -> None:
    _table(mine, form, [{"file_name": "cat/0.png", "text": "one"}, {"file_name": "cat/1.jpg", "text": "two"}])
    assert _captions(mine) == {"cat/0.png": ("one",), "cat/1.jpg.png": ("two",)}
    _refused(mine, f"metadata.{form}: no column 'label'", "data.captions=true", stated=CLASSES)


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_another_column_of_captions_is_named_in_the_config(mine: Path, form: str) -> None:
    _table(mine, form, [{"file_name": "cat/0.png", "text": "one", "prompt": "two"}])
    assert _captions(mine, Stated((), captions=True, caption_column="prompt")) == {"cat/0.png": ("two",)}
    _refused(mine, "no column 'subject' (data.caption_column)", stated=Stated((), False, True, "subject"))


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_list_in_a_table_is_several_captions(mine: Path, form: str) -> None:
    _table(mine, form, [{"file_name": "cat/0.png", "text": ["one", "two "]}])
    assert _captions(mine) == {"cat/0.png": ("one", "two")}


def test_a_table_without_captions_takes_the_texts_beside_the_pictures(mine: Path) -> None:
    """Persons need a table; the captions may still lie beside the pictures."""
    _table(mine, "csv", [{"file_name": "cat/0.png", "person": "Ann"}, {"file_name": "dog/0.png", "person": "Bo"}])
    pictures = folder_pictures(mine, Stated((), by_person=True, captions=True), 8, 1, Told())
    assert {p.person: p.captions for p in pictures} == {
        "Ann": ("a photo of cat/0.png",),
        "Bo": ("a photo of dog/0.png",),
    }


def test_whole_numbers_are_classes_and_persons_too(mine: Path) -> None:
    _table(mine, "jsonl", [{"file_name": "cat/0.png", "label": 0, "person": 7}])
    (picture,) = folder_pictures(mine, Stated(("0", "1"), by_person=True), 8, 1, Told())
    assert (picture.label, picture.person) == ("0", "7")


@pytest.mark.parametrize(
    ("form", "content", "words"),
    [
        ("jsonl", b'{"file_name": "cat/0.png", "text": "secret"', "line 1: no JSON object"),
        ("jsonl", b'{"file_name": "cat/0.png", "text": "a"}\n["secret"]', "line 2: no JSON object"),
        ("jsonl", b'{"file_name": "cat/0.png", "text": {"secret": 1}}', "neither a text nor a list of texts"),
        ("jsonl", b'{"file_name": "cat/0.png", "text": null}', "no caption: 'cat/0.png'"),
        ("jsonl", b'{"file_name": 7, "text": "secret"}', "line 1: no file_name"),
        ("jsonl", b'{"file_name": "../secret.png", "text": "a"}'.replace(b"secret", b"x"), "leads out of the folder"),
        ("jsonl", b'{"text": "secret"}', "no column 'file_name'; it has text"),
        ("jsonl", b"", "no pictures in it"),
        ("jsonl", '{"file_name": "cat/0.png", "text": "secret"}'.encode("utf-16"), "not UTF-8"),
        ("parquet", b"secret", "metadata.parquet: cannot be read"),
        ("csv", b"file_name,text\ncat/0.png,secret,\n", "line 2: not as many fields"),
    ],
)
def test_a_bad_table_is_one_line_that_names_the_place(mine: Path, form: str, content: bytes, words: str) -> None:
    (mine / f"metadata.{form}").write_bytes(content)
    with pytest.raises(InputError) as caught:
        _captions(mine)
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert "secret" not in str(caught.value)


def test_two_tables_are_refused(mine: Path) -> None:
    for form in ("csv", "jsonl"):
        _table(mine, form, [{"file_name": "cat/0.png", "text": "one"}])
    _refused(mine, "metadata.csv: metadata.jsonl lies beside it")


@pytest.mark.parametrize(
    "table",
    [
        "file_name;label\ncat/0.png;cat\ndog/0.png;dog\n",
        '\ufeff"file_name";"label"\r\n"cat/0.png";"cat"\r\n"dog/0.png";"dog"\r\n',
        "file_name\tlabel\ncat/0.png\tcat\ndog/0.png\tdog\n",
        "file_name , label\n cat/0.png ,  cat \ndog/0.png, dog\n\n",
        "file_name,label\ncat\\0.png,cat\ndog\\0.png,dog\n",
        "label,file_name\ncat, cat/0.png\n dog,dog/0.png \n",
    ],
)
def test_what_spreadsheets_and_windows_write_is_read(mine: Path, table: str) -> None:
    (mine / "metadata.csv").write_bytes(table.encode())
    found = [(p.file_name, p.label) for p in folder_pictures(mine, CLASSES, 8, 1, Told())]
    assert found == [("cat/0.png", "cat"), ("dog/0.png", "dog")]


def test_a_file_whose_name_has_blanks_or_backslashes_is_found_as_it_is(mine: Path) -> None:
    for name in (" 0.png", "a\\b.png"):
        _save(mine / name)
    _table(mine, "csv", [{"file_name": " 0.png", "label": "cat"}, {"file_name": "a\\b.png", "label": "dog"}])
    assert [p.file_name for p in folder_pictures(mine, CLASSES, 8, 1, Told())] == [" 0.png", "a\\b.png"]


def _config(folder: Path, more: str = "data.captions=true data.classes=[]") -> Config:
    return load("folder", {}, f"data.path={folder} data.n_public=16 privacy.batch_size=4 data.size=8 {more}")


def test_captions_reach_the_prepared_dataset_without_classes(tmp_path: Path) -> None:
    for number in range(12):
        path = _save(tmp_path / f"mine/{number}.png", number)
        path.with_suffix(".txt").write_text(f"number {number}\nthe same {number}")
    told = Told()
    prepare_private(_config(tmp_path / "mine"), tmp_path / "set", told)
    dataset = read_dataset(tmp_path / "set", [], "train")
    expected = [name.removesuffix(".png") for name in dataset.file_names]
    assert dataset.captions == tuple((f"number {name}", f"the same {name}") for name in expected)
    assert dataset.labels.tolist() == [0] * len(dataset)
    assert told.kept == [f"folder: written to {tmp_path / 'set'}"]
    check_prepared(_config(tmp_path / "mine"), tmp_path / "set")
    for other in ("data.classes=[a]", "data.captions=true data.classes=[] data.caption_column=prompt"):
        with pytest.raises(InputError, match="was prepared with another"):
            check_prepared(_config(tmp_path / "mine", other), tmp_path / "set")


def test_pictures_of_one_public_prompt_need_neither_classes_nor_captions(tmp_path: Path) -> None:
    for number in range(12):
        _save(tmp_path / f"mine/{'' if number % 2 else 'more/'}{number}.png", number)
    config = _config(tmp_path / "mine", "data.prompt='a red toy' data.classes=[]")
    prepare_private(config, tmp_path / "set", Told())
    dataset = read_dataset(tmp_path / "set", [], "train")
    assert dataset.captions is None
    assert texts_of(config, dataset) == [["a red toy"]] * len(dataset)
    assert drawn_prompts(config) == ["a red toy"]


def test_public_prompts_of_classes_go_to_the_pictures_of_their_classes(mine: Path, tmp_path: Path) -> None:
    for number in range(12):
        _save(mine / f"{'cat' if number % 3 else 'dog'}/{number}.png", number)
    prompts = {"cat": "a cat at night", "dog": "a dog at noon"}
    config = _config(mine, f"data.classes=[cat,dog] data.prompts={list(prompts.values())}".replace("'", '"'))
    prepare_private(config, tmp_path / "set", Told())
    dataset = read_dataset(tmp_path / "set", ["cat", "dog"], "train")
    expected = [[prompts[name.partition("/")[0]]] for name in dataset.file_names]
    assert texts_of(config, dataset) == expected
    assert len(set(map(tuple, expected))) == 2
    assert drawn_prompts(config) == list(prompts.values())


def test_a_changed_or_withdrawn_caption_is_a_changed_folder(mine: Path) -> None:
    with_captions = Stated(("cat", "dog"), captions=True)
    before = [fingerprint(mine, stated) for stated in (CLASSES, with_captions)]
    assert before == [fingerprint(mine, stated) for stated in (CLASSES, with_captions)]
    (mine / "cat/0.txt").write_text("another one")
    after = [fingerprint(mine, stated) for stated in (CLASSES, with_captions)]
    assert not set(before) & set(after)
    (mine / "cat/0.txt").unlink()
    assert fingerprint(mine, CLASSES) not in (*before, *after)
    bare = fingerprint(mine, CLASSES)
    for text in mine.rglob("*.txt"):
        text.unlink()
    assert fingerprint(mine, CLASSES) == bare  # once a picture lacks a caption, no caption counts
