"""A user's own folder: one line names each bad file, and a person's split never depends on other persons."""

import os
import re
import struct
import subprocess
import sys
import zlib
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dp_lora.data import folder as own_folder
from dp_lora.data.faults import MOST
from dp_lora.data.folder import folder_pictures, list_pictures
from dp_lora.data.layout import Picture, read_dataset, write_dataset
from dp_lora.data.metadata_table import Stated
from dp_lora.data.open_picture import look_at, read_picture
from dp_lora.data.png import decode_png, formats
from dp_lora.data.split import split_of, unit_hash
from dp_lora.errors import PRIVATE_PICTURE, InputError
from dp_lora.events import Events

CLASSES = ["cat", "dog"]


def _save(path: Path, size: tuple[int, int] = (12, 9), mode: str = "RGB", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path, **options)
    return path


def _pictures(folder: Path, person_required: bool = False, channels: int = 1) -> list[Picture]:
    return list(folder_pictures(folder, Stated(tuple(CLASSES), person_required), 8, channels, Events()))


def _refused(folder: Path, *words: str, person_required: bool = False) -> str:
    """The line that refuses the folder; checks that it has all `words`, and no number of pictures."""
    with pytest.raises(InputError) as caught:
        _pictures(folder, person_required)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for word in words:
        assert word in message
    # a run's record may hold the config's own words alone
    public = caught.value.public
    assert public in (PRIVATE_PICTURE, message if message.startswith("data.path=") else PRIVATE_PICTURE)
    return message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven good pictures in two classes."""
    for name in ("cat/1.png", "cat/2.jpg", "cat/deep/3.bmp", "dog/4.webp", "dog/5.gif", "dog/6.tif", "dog/7.ppm"):
        _save(tmp_path / "mine" / name)
    return tmp_path / "mine"


def _table(folder: Path, *lines: str) -> None:
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_class_subfolders_become_a_dataset_of_their_pictures(folder: Path, tmp_path: Path) -> None:
    (folder / "cat/.hidden").write_text("no picture")
    for number, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file() and p.name != ".hidden")):
        Image.new("RGB", (20, 16), (number * 30, 0, 0)).save(path.with_suffix(".png"))
        if path.suffix != ".png":
            path.unlink()
    pictures = _pictures(folder, channels=3)
    names = ["cat/1.png", "cat/2.png", "cat/deep/3.png", "dog/4.png", "dog/5.png", "dog/6.png", "dog/7.png"]
    assert [p.file_name for p in pictures] == names
    assert [p.label for p in pictures] == ["cat"] * 3 + ["dog"] * 4
    assert [decode_png(p.png, 8, 3)[4, 4, 0] for p in pictures] == [number * 30 for number in range(7)]
    write_dataset(tmp_path / "set", pictures, {}, 8, 3, False)
    train = read_dataset(tmp_path / "set", CLASSES, "train")
    assert train.images(slice(None))[:, 4, 4, 0].tolist() == [30 * names.index(name) for name in train.file_names]


def test_every_raster_format_becomes_png_without_a_clash_of_names(folder: Path) -> None:
    names = [p.file_name for p in _pictures(folder)]
    assert names[:3] == ["cat/1.png", "cat/2.jpg.png", "cat/deep/3.bmp.png"]
    assert len(set(names)) == 7


def test_a_format_is_read_off_the_content_whatever_the_name_says(folder: Path) -> None:
    Image.new("RGB", (12, 9), "red").save(folder / "cat/0.png", "JPEG")
    first = _pictures(folder, channels=3)[0]
    assert first.file_name == "cat/0.png"
    assert decode_png(first.png, 8, 3)[4, 4, 0] > 250


def test_heic_is_read_where_its_package_is_installed_and_there_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = []
    for installed in (None, SimpleNamespace(register_heif_opener=lambda: registered.append(True))):
        monkeypatch.setitem(sys.modules, "pillow_heif", installed)  # None: an import of it fails
        assert ("HEIF" in formats.__wrapped__()) is (installed is not None)
    assert registered == [True]


def test_a_csv_chooses_files_labels_and_persons(folder: Path) -> None:
    table = '\ufefffile_name,label,person,note\ndog/4.webp,cat,"Ann, B.",x\n./cat//1.png,dog,Bo,\n'
    (folder / "metadata.csv").write_text(table, encoding="utf-8")
    found = [(p.file_name, p.label, p.person) for p in _pictures(folder, person_required=True)]
    assert found == [("cat/1.png", "dog", "Bo"), ("dog/4.webp.png", "cat", "Ann, B.")]


def test_split_sends_a_fifth_of_the_identifiers_to_the_test_side() -> None:
    share = np.mean([split_of(f"person {i}") == "test" for i in range(20000)])
    assert abs(share - 0.2) < 0.012  # four standard deviations
    assert unit_hash("person 0") == pytest.approx(0.6902754476759583, abs=1e-12)  # must never change


def test_neighbours_put_everybody_else_on_the_same_side(folder: Path) -> None:
    for number in range(20):
        _save(folder / f"cat/x{number}.png")
    before = {p.file_name: p.split for p in _pictures(folder)}
    assert set(before.values()) == {"train", "test"}
    (folder / "cat/x3.png").unlink()
    _save(folder / "cat/0 a new one.png")
    after = {p.file_name: p.split for p in _pictures(folder)}
    assert {name: after[name] for name in before if name in after} == {n: before[n] for n in before if n in after}


def test_one_person_stands_on_one_side_whatever_the_files_are_called(folder: Path) -> None:
    lines, people = ["file_name,label,person"], [f"p{number}" for number in range(15)]
    for number in range(60):
        _save(folder / f"all/{number}.png", (2, 2))
        lines.append(f"all/{number}.png,cat,{people[number % 15]}")
    _table(folder, *lines)
    sides: dict[str, set] = {}
    for picture in _pictures(folder, person_required=True):
        sides.setdefault(str(picture.person), set()).add(picture.split)
    assert sides == {person: {split_of(person)} for person in people}
    assert {split_of(person) for person in people} == {"train", "test"}


def test_a_wide_picture_keeps_its_centre_square(tmp_path: Path) -> None:
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 255
    Image.fromarray(image).save(tmp_path / "wide.png")
    Image.fromarray(image.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    for name in ("wide.png", "tall.png"):
        assert read_picture(tmp_path / name, 16, 1).min() == 255
    assert read_picture(tmp_path / "wide.png", 16, 3).shape == (16, 16, 3)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16"])
def test_every_mode_becomes_grey_and_colour(tmp_path: Path, mode: str) -> None:
    grey = Image.new("L", (6, 6), 255)
    if mode == "I;16":
        Image.fromarray(np.full((6, 6), 65535, np.uint16)).save(tmp_path / "a.tif")
    else:
        image = grey.convert(mode if mode in ("1", "L", "LA") else "RGB").convert(mode)
        image.save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    path = next(tmp_path.iterdir())
    for channels in (1, 3):
        found = read_picture(path, 4, channels)
        assert found.shape == (4, 4, channels)
        assert found.min() >= 254


def test_16_bit_greys_are_scaled_not_cut_off(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 128 * 257, np.uint16)).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png", 4, 1).ravel().tolist() == [128] * 16


def test_transparency_is_white_and_exif_turns_the_picture_upright(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png", 4, 3).min() == 255
    image = np.zeros((32, 32), np.uint8)
    image[:16] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(image).save(tmp_path / "b.png", exif=exif)
    found = read_picture(tmp_path / "b.png", 8, 1)
    assert found[0].max() == 0
    assert found[-1].min() == 255


def _cut(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _bomb(path: Path) -> None:
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", b"")]
    parts = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def _smaller_bomb(path: Path) -> None:
    Image.new("1", (9000, 9000)).save(path)  # 81 million pixels in a small file


def _animation(path: Path) -> None:
    frames = [Image.new("L", (4, 4), value) for value in (0, 99)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def _heic(path: Path) -> None:
    path.write_bytes(struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic" + bytes(64))


def _postscript(path: Path) -> None:
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")


@pytest.mark.parametrize(
    ("name", "spoil", "reason"),
    [
        ("zero.png", lambda p: p.write_bytes(b""), "the file is empty"),
        ("text.png", lambda p: p.write_text("hello"), "not a picture of a known format"),
        ("notes.txt", lambda p: p.write_text("hello"), "a caption without its picture"),
        ("1.caption", lambda p: p.write_text("hello"), "captions are read from NAME.txt"),
        ("code.eps", _postscript, "not a picture of a known format"),
        ("cut.png", _cut, "not a readable picture"),
        ("cut.jpg", _cut, "the file is cut off"),
        ("cut.webp", _cut, "not a readable picture"),
        ("bomb.png", _bomb, "not a readable picture"),
        ("large.png", _smaller_bomb, "more than 67108864 pixels"),
        ("film.gif", _animation, "an animation"),
        ("pages.tif", _animation, "several pages"),
        ("phone.heic", _heic, "not a readable picture" if find_spec("pillow_heif") else "package pillow-heif"),
        ("scan.dcm", lambda p: p.write_bytes(bytes(128) + b"DICM"), "DICOM is not read"),
        ("tiny.png", lambda p: _save(p, (1, 5)), "its shorter side is below a quarter of data.size=8"),
        ("film.png", _animation, "an animation"),
        ("float.tif", lambda p: Image.new("F", (4, 4)).save(p), "more than 16 bits"),
        ("pipe.png", os.mkfifo, "not a file"),
        ("lost.png", lambda p: p.symlink_to("nowhere.png"), "no such file"),
        ("loop.png", lambda p: p.symlink_to("loop.png"), "no such file"),
        ("two\nlines.png", lambda p: p.write_bytes(b"x"), "two\\nlines.png"),
        ("again.png", lambda p: p.symlink_to("1.png"), "the same file as 'cat/1.png', linked or listed twice"),
        ("hard.png", lambda p: p.hardlink_to(p.with_name("1.png")), "the same file as 'cat/1.png', linked"),
    ],
)
def test_a_bad_file_is_refused_by_name(folder: Path, name: str, spoil, reason: str) -> None:
    spoil(folder / "cat" / name)
    message = _refused(folder, reason)
    assert repr(f"cat/{name}")[1:-1] in message or f"cat/{name}" in message


def test_links_out_of_the_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    secret = _save(tmp_path / "secret" / "s.png")
    link = folder / "dog/link.png"
    link.symlink_to(secret)
    _refused(folder, "dog/link.png", "leads out of the folder")
    link.unlink()
    (folder / "cat/more").symlink_to(secret.parent)
    _refused(folder, "cat/more", "a link to a folder")
    (folder / "cat/more").unlink()
    (folder / "dog/door").symlink_to(secret.parent)
    _table(folder, "file_name,label", "dog/door/s.png,dog")
    _refused(folder, "dog/door/s.png", "leads out of the folder")


def test_other_classes_are_refused_by_name_and_missing_ones_are_not(folder: Path) -> None:
    assert {p.label for p in list_pictures(folder, Stated((*CLASSES, "emu"))).pictures} == set(CLASSES)
    _save(folder / "horse/1.png")
    _refused(folder, "horse", "'horse' is not in data.classes")
    _table(folder, "file_name,label", "cat/1.png,cat", "horse/1.png,horse")
    _refused(folder, "horse/1.png", "'horse' is not in data.classes")


def test_an_empty_class_folder_is_as_none_and_one_of_another_class_is_refused_by_name(folder: Path) -> None:
    (folder / "emu").mkdir()
    assert {p.label for p in list_pictures(folder, Stated((*CLASSES, "emu"))).pictures} == set(CLASSES)
    _refused(folder, "class 'emu' is not in data.classes")


def test_one_run_names_all_faults_of_a_folder_s_names_and_captions(folder: Path, capfd) -> None:
    _save(folder / "horse/1.png")
    _save(folder / "3_dog/1.png")
    (folder / "cat/lost.txt").write_text("a caption without its picture")
    (folder / "cat/1.txt").write_bytes(b"\xff")
    (folder / "dog/link.png").symlink_to("nowhere.png")
    message = _refused(folder, "the lines above name 5 files", "type the same command again")
    lines = capfd.readouterr().err.splitlines()
    for name, says in (
        ("horse", "is not in data.classes"),
        ("3_dog", "named as kohya names repeats"),
        ("cat/lost.txt", "a caption without its picture"),
        ("cat/1.txt", "not UTF-8"),
        ("dog/link.png", "no such file"),
    ):
        (line,) = [line for line in lines if f"{folder}/{name}:" in line]
        assert says in line
        assert name not in message
    # at most so many are shown, and the error says how many there are beyond them
    for number in range(MOST):
        (folder / f"cat/lost{number}.txt").write_text("a caption without its picture")
    _refused(folder, f"the lines above name {MOST} files that cannot be taken, and there are 5 more")
    assert len(capfd.readouterr().err.splitlines()) == MOST


def test_one_run_names_all_faults_of_a_table(folder: Path, capfd) -> None:
    rows = ("cat/1.png,cat", "cat/2.png,", "../out.png,cat", "cat/none.png,cat", "dog/1.png,horse")
    _table(folder, "file_name,label", *rows)
    _refused(folder, "the lines above name 4 files")
    told = capfd.readouterr().err
    for says in ("line 3: 'cat/2.png': its label is missing", "line 4: file_name '../out.png' leads out",
                 "cat/none.png: no such file", "class 'horse' is not in data.classes"):  # fmt: skip
        assert says in told


def test_a_picture_outside_all_classes_is_refused(folder: Path) -> None:
    _save(folder / "stray.png")
    _refused(folder, "stray.png", "lies in no class subfolder")


def test_known_litter_is_left_out_and_named_once(folder: Path, capfd: pytest.CaptureFixture) -> None:
    for name in (".DS_Store", "cat/.DS_Store", "cat/Thumbs.db", "dog/desktop.ini", "README.txt", "dog/.gitkeep"):
        (folder / name).write_text("no picture")
    _save(folder / "__MACOSX/cat/._1.png")
    assert len(_pictures(folder)) == 7
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "left out" in line]
    assert line == "left out, not pictures: .DS_Store, .gitkeep, README.txt, Thumbs.db, __MACOSX, ..."


@pytest.mark.parametrize("classes", [tuple(CLASSES), ()])
def test_repeats_are_refused_with_the_reason(folder: Path, classes: tuple[str, ...]) -> None:
    (folder / "cat").rename(folder / "10_cat")
    for text in folder.rglob("*.*"):
        text.with_suffix(".txt").write_text("a caption")
    with pytest.raises(InputError, match=r"10_cat: named as kohya names repeats.*weight.*rename it to 'cat'"):
        list_pictures(folder, Stated(classes, captions=True))
    assert {p.label for p in list_pictures(folder, Stated(("10_cat", "dog"))).pictures} == {"10_cat", "dog"}


def test_all_bad_pictures_are_named_in_one_run_before_one_is_converted(
    folder: Path, monkeypatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(own_folder, "read_picture", lambda *_: pytest.fail("converted"))
    spoilt = {"cat/2.jpg": "the file is cut off", "dog/4.webp": "the file is empty", "dog/7.ppm": "known format"}
    _cut(folder / "cat/2.jpg")
    (folder / "dog/4.webp").write_bytes(b"")
    (folder / "dog/7.ppm").write_text("hello")
    message = _refused(folder, "data.path=", "the lines above name 3 files", "type the same command again")
    lines = capfd.readouterr().err.splitlines()
    for name, reason in spoilt.items():
        assert [line for line in lines if name in line and reason in line]
        assert name not in message


def test_what_only_decoding_tells_is_named_for_all_pictures_too(folder: Path, capfd: pytest.CaptureFixture) -> None:
    for name in ("cat/8.png", "dog/9.png"):
        _save(folder / name, (64, 64))
        content = bytearray((folder / name).read_bytes())
        content[content.index(b"IDAT") + 6] ^= 255
        (folder / name).write_bytes(content)
    _refused(folder, "the lines above name 2 files")
    shown = capfd.readouterr().err
    assert "cat/8.png: not a readable picture" in shown
    assert "dog/9.png: not a readable picture" in shown


def test_films_behind_a_phone_s_picture_do_not_cut_it_off(folder: Path) -> None:
    with (folder / "cat/2.jpg").open("ab") as file:
        file.write(bytes(10000))
    assert len(_pictures(folder)) == 7


def test_avif_is_read(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), (250, 250, 250)).save(tmp_path / "a.avif")
    assert read_picture(tmp_path / "a.avif", 8, 1).min() > 240


def test_a_page_of_tiff_with_8_or_16_bit_is_read(tmp_path: Path) -> None:
    for kind, value in ((np.uint8, 200), (np.uint16, 200 * 257)):
        Image.fromarray(np.full((8, 8), value, kind)).save(tmp_path / "a.tif")
        assert read_picture(tmp_path / "a.tif", 8, 1).ravel().tolist() == [200] * 64


LARGE = """
import resource, sys
from pathlib import Path
from dp_lora.data.open_picture import look_at, read_picture
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
look_at(Path(sys.argv[1]), 32)
picture = read_picture(Path(sys.argv[1]), 32, 1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, picture[:, 0].mean(), picture[:, -1].mean())
"""


def test_the_largest_photograph_is_read_in_little_memory(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 14000).astype(np.uint8), (14000, 14000))  # 196 million pixels
    Image.fromarray(ramp).save(tmp_path / "a.jpg", quality=50)
    done = subprocess.run([sys.executable, "-c", LARGE, tmp_path / "a.jpg"], capture_output=True, text=True, check=True)
    grown, left, right = map(float, done.stdout.split())
    assert grown < 60_000  # kB; its pixels take 196,000
    assert left < 10
    assert right > 245
    with (tmp_path / "b.jpg").open("wb") as file:
        Image.fromarray(ramp[:9000, :9000]).save(file, "JPEG", progressive=True, quality=10)
    with pytest.raises(InputError, match="more than 67108864 pixels; make it smaller, or save it as a baseline JPEG"):
        look_at(tmp_path / "b.jpg", 32)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["file_name,label", "../secret.png,cat"], ["../secret.png", "line 2", "leads out of the folder"]),
        (["file_name,label", "/etc/hostname,cat"], ["/etc/hostname", "leads out of the folder"]),
        (["file_name,label", "cat/../cat/1.png,cat"], ["cat/../cat/1.png", "leads out of the folder"]),
        (["file_name,label", ",cat"], ["line 2", "leads out of the folder"]),
        (["file_name,label", "cat/9.png,cat"], ["cat/9.png", "no such file"]),
        (["file_name,label", "cat,cat"], ["mine/cat", "not a file"]),
        (["file_name,label", "x" * 300 + ".png,cat"], ["xxx.png", "no such file"]),
        (["file_name,label", "cat/1.png,cat", "./cat/1.png,dog"], ["cat/1.png", "listed twice"]),
        (["file_name,label", "cat/1.png"], ["metadata.csv, line 2", "not as many fields"]),
        (["file_name,label", "cat/1.png,cat,,"], ["metadata.csv, line 2", "not as many fields"]),
        (["file,label", "cat/1.png,cat"], ["metadata.csv", "no column 'file_name'"]),
        (["file_name", "cat/1.png"], ["metadata.csv", "no column 'label'"]),
        (
            ["file_name,label,person", "cat/1.png,cat,Bo", "dog/5.gif,dog, "],
            ["line 3", "dog/5.gif", "person is missing"],
        ),
        (
            ["file_name,label,person", "cat/1.png,cat,Ann", "dog/5.gif,dog,Bo", "dog/4.webp,dog, ann "],
            ["metadata.csv: ", "line 2 'Ann', line 4 'ann'", "several spellings"],
        ),
        (["file_name,label,person", "cat/1.png,cat,1", "dog/5.gif,dog,1.0"], ["line 2 '1', line 3 '1.0'"]),
        (
            ["file_name,label,person", "cat/1.png,cat,Bo", "dog/5.gif,dog,NaN"],
            ["metadata.csv: line 3 'NaN'", "missing"],
        ),
        (["file_name,label", 'cat/1.png,"cat'], ["metadata.csv", "cannot be read"]),
        (["file_name,label", "cat/\0.png,cat"], ["line 2"]),
        (["file_name,label"], ["no pictures in it"]),
        ([], ["metadata.csv", "no column 'file_name'"]),
    ],
)
def test_a_bad_csv_is_one_line_that_names_the_place(folder: Path, lines: list[str], words: list[str]) -> None:
    _table(folder, *lines)
    _refused(folder, *words)


def test_one_name_in_two_encodings_of_unicode_is_one_person(folder: Path) -> None:
    _table(folder, "file_name,label,person", "cat/1.png,cat,Zo\u00eb", "dog/5.gif,dog, Zoe\u0308 ")
    assert {picture.person for picture in _pictures(folder, person_required=True)} == {"Zo\u00eb"}


def test_a_hard_link_in_another_class_is_refused_by_name(folder: Path) -> None:
    (folder / "dog/also.png").hardlink_to(folder / "cat/1.png")
    _refused(folder, "dog/also.png", "the same file as 'cat/1.png'")


def test_a_file_that_is_linked_from_elsewhere_is_one_picture(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.png").hardlink_to(folder / "cat/1.png")
    assert len(_pictures(folder)) == 7


def test_a_csv_in_another_encoding_is_one_line(folder: Path) -> None:
    (folder / "metadata.csv").write_bytes("file_name,label\ncat/ä.png,cat\n".encode("latin-1"))
    _refused(folder, "metadata.csv", "not UTF-8")


def test_a_file_name_that_is_not_utf8_is_refused(folder: Path) -> None:
    os.rename(folder / "cat/1.png", os.fsencode(folder / "cat") + b"/\xff.png")
    _refused(folder, r"\udcff.png", "not UTF-8")


def test_units_of_persons_need_the_column(folder: Path) -> None:
    _refused(folder, "metadata.csv", "missing", "privacy.unit=person", person_required=True)
    _table(folder, "file_name,label", "cat/1.png,cat")
    _refused(folder, "metadata.csv", "no column 'person'", person_required=True)


def test_no_folder_and_an_empty_folder_are_one_line(tmp_path: Path) -> None:
    _refused(tmp_path / "none", "data.path=", "no such folder")
    (tmp_path / "empty").mkdir()
    _refused(tmp_path / "empty", "no pictures in it")


def test_nothing_that_is_printed_counts_the_pictures(folder: Path, capfd: pytest.CaptureFixture) -> None:
    _pictures(folder)
    shown = re.sub(r"\d+%|\d\d:\d\d", "", capfd.readouterr().err)
    assert "prepare" in shown
    assert not re.search(r"\d", shown)


def test_labels_and_names_are_checked_before_any_picture_is_opened(folder: Path, monkeypatch) -> None:
    for name in ("look_at", "read_picture"):
        monkeypatch.setattr(own_folder, name, lambda *_: pytest.fail("opened"))
    _save(folder / "horse/1.png")
    _refused(folder, "horse")
    _table(folder, "file_name,label,person", "cat/1.png,cat,Ann", "dog/5.gif,dog,ANN")
    _refused(folder, "spellings")
