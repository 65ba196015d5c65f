"""The contact sheet shows private pictures as training sees them, to the operator alone, and goes when they go."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image, ImageFont

from dp_lora.cli import common, pipelines, prepared
from dp_lora.config import load, write_resolved
from dp_lora.data.contact_sheet import GAP, LINE, LINES, SIDE, _wrapped, font, write_contact_sheet
from dp_lora.data.layout import Picture, write_dataset
from dp_lora.data.png import encode_png
from tests.support.kept import everything
from tests.support.tracking_store import use_store

SECRET = "anna-larsson"
OWN = "data.captions=true data.classes=[] data.size=16 data.n_public=16 privacy.batch_size=4"


def _fill(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for number in range(12):
        Image.new("L", (40, 30), 20 * number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"portrait {number} of {SECRET}")
    return folder


def _prepare(root: Path, pictures: Path) -> Result:
    """Call `prepare` as DVC does."""
    from dp_lora.commands.prepare import main

    write_resolved(load("folder", {}, f"data.path={pictures} {OWN}"), root / "resolved.yaml")
    out = root / "outputs/folder/data"
    given = ["--part", "private", "--resolved", str(root / "resolved.yaml"), "--out", str(out)]
    return CliRunner().invoke(main, given)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_store(tmp_path, monkeypatch)
    monkeypatch.setattr(common, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(pipelines, "ROOT", tmp_path)
    monkeypatch.setattr(prepared, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(prepared, "WORKING", tmp_path / "runs/working")
    monkeypatch.setattr("dp_lora.cli.record.RUNS", tmp_path / "runs")
    return tmp_path


def test_prepare_draws_a_sheet_for_the_operator_alone_and_says_where_it_lies(place: Path) -> None:
    result = _prepare(place, _fill(place / "pictures"))
    assert result.exit_code == 0, result.output
    sheet = place / "runs/working/private/folder/contact_sheet.png"
    assert f"{prepared.relative(sheet)}: pictures as they are trained; for your eyes alone" in result.stderr
    assert "captions: 12, of 12 pictures" in result.stderr
    assert "the centre square is kept" in result.stderr
    assert sheet.stat().st_mode & 0o777 == 0o600
    assert sheet.parent.stat().st_mode & 0o777 == 0o700
    assert not list((place / "outputs").rglob("contact*"))
    assert not list((place / "outputs").rglob("*.txt"))
    assert not list((place / "mlartifacts").rglob("*.png"))
    assert SECRET in (place / "pictures/0.txt").read_text()
    for name, content in everything(place):  # everything in the store and in a run's record
        assert SECRET.encode() not in content, name
    (place / "pictures/0.png").unlink()
    (place / "pictures/0.txt").unlink()
    prepared.look(load("folder", {}, f"data.path={place / 'pictures'} {OWN}"))
    assert not sheet.exists()


def test_a_bad_caption_is_told_on_the_terminal_and_nowhere_else(place: Path) -> None:
    pictures = _fill(place / "pictures")
    (pictures / f"{SECRET}.txt").write_text(SECRET)
    result = _prepare(place, pictures)
    assert result.exit_code == 1
    assert f"{SECRET}.txt: a caption without its picture" in result.stderr
    for name, content in everything(place):
        assert SECRET.encode() not in content, name


@pytest.mark.parametrize("classes", [["cat", "dog"], []])
def test_the_sheet_shows_each_picture_as_it_is_stored(tmp_path: Path, classes: list[str]) -> None:
    rows = []
    for number in range(3):
        image = np.full((16, 16, 3), 60 * number, np.uint8)
        label = classes[number % 2] if classes else None
        captions = None if classes else (f"caption {number}", "another")
        rows.append(Picture(f"{number}.png", label, "train", encode_png(image), None, captions))
    write_dataset(tmp_path / "set", rows, {}, 16, 3, packed=False)
    write_contact_sheet(tmp_path / "set", classes, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet)
    for number in range(3):
        left, top = GAP + number * (SIDE + GAP), 2 * LINE
        assert (pixels[top : top + SIDE, left : left + SIDE] == 60 * number).all()
        assert (pixels[top + SIDE : top + SIDE + LINE, left : left + SIDE] < 100).any()  # its class or caption
    assert pixels.shape[0] == 2 * LINE + GAP + SIDE + LINES * LINE + GAP


@pytest.mark.parametrize("text", ["a cat " * 50, "x" * 300, "\u732b" * 100, "two\nlines", "", " "])
def test_a_long_caption_is_cut_and_never_wider_than_its_picture(text: str) -> None:
    letters = font()
    lines = _wrapped(text, letters)
    assert isinstance(letters, ImageFont.FreeTypeFont)
    assert len(lines) <= LINES
    assert all(letters.getlength(line.removesuffix("…")) <= SIDE for line in lines)
    assert "".join(lines).removesuffix("…").replace(" ", "") in text.replace(" ", "").replace("\n", "")
