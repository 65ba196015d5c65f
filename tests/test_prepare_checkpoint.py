"""cin256: a download resumes, its archive is not trusted, and its hash is recorded once and checked ever after."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dp_lora.data import download
from dp_lora.data.checkpoint import checked_checkpoint
from dp_lora.errors import InputError
from dp_lora.events import Events
from dp_lora.files import digest_file, read_json
from tests.support.download_server import Server, serving
from tests.support.prepare_call import CHECKPOINT, Project
from tests.support.served import WEIGHTS, archive

FOLDER = Path(__file__).parent / "data" / "hostile"
PATH = "/files/cin.zip"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download, "PAUSE", 0.01)
    with serving() as running:
        running.files[PATH] = archive()
        yield running


def gets(server: Server) -> list[str | None]:
    return [asked for method, _, asked in server.requests if method == "GET"]


def test_a_checkpoint_is_downloaded_unpacked_and_known_by_its_hash(project: Project, server: Server):
    result = project.prepare("mnist5k", f"{CHECKPOINT}{server.url}{PATH}")
    assert result.exit_code == 0, result.output
    folder = project.root / "data/cin256"
    assert (folder / "model.ckpt").read_bytes() == WEIGHTS
    source = read_json(folder / "source.json")
    assert source["url"] == server.url + PATH
    assert (source["size"], source["sha256"]) == (len(server.files[PATH]), server.etag(PATH))
    assert source["file"]["sha256"] == digest_file(folder / "model.ckpt")
    assert project.commits == [("commit", "--force", "data.dvc")]
    assert not (project.root / "data/.cin256.part").exists()
    # a second call downloads nothing
    assert project.prepare("mnist5k", f"{CHECKPOINT}{server.url}{PATH}").exit_code == 0
    assert gets(server) == [None]


def test_a_file_on_disk_serves_too_and_stays(project: Project, tmp_path: Path):
    (tmp_path / "mine.zip").write_bytes(archive())
    assert project.prepare("mnist5k", f"{CHECKPOINT}{tmp_path}/mine.zip").exit_code == 0
    assert (project.root / "data/cin256/model.ckpt").read_bytes() == WEIGHTS
    assert (tmp_path / "mine.zip").exists()
    (tmp_path / "other").mkdir()
    project.commits.clear()
    project.refused("mnist5k", f"checkpoint.folder=data/other checkpoint.url={tmp_path}/none.zip", "no such file")


HOSTILE = {
    "absolute-path": "'/nonexistent-directory/evil.txt'",
    "backslash-traversal": "evil.txt",
    "bad-crc": "CRC",
    "bomb-50MB": "grows from 48,604 to 50,000,000 bytes",
    "duplicate-member": "2 times",
    "html-instead-of-zip": "not a zip file",
    "no-checkpoint-inside": "'readme.txt'",
    "path-traversal": "'../evil.txt'",
    "symlink": "'model.ckpt' is a link",
    "symlink-dir-then-file": "'out' is a link",
    "truncated": "not a zip file",
    "wrong-declared-size": "not a whole zip archive",
}


def test_every_hostile_archive_has_its_line():
    assert {path.stem for path in FOLDER.glob("*.zip")} == HOSTILE.keys()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_in_one_line_that_says_why(
    project: Project, server: Server, name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(project.root)
    server.files[PATH] = (FOLDER / f"{name}.zip").read_bytes()
    project.refused("mnist5k", f"{CHECKPOINT}{server.url}{PATH}", server.url + PATH, HOSTILE[name])
    assert project.shown() == []
    left = {path.name for path in project.root.rglob("*") if path.is_file() and path.suffix != ".zip"}
    assert left == {".cin256.lock"}
    assert not list(project.root.parent.rglob("*evil*"))
    assert not Path("/nonexistent-directory").exists()


def test_an_archive_that_another_setting_would_take_is_not_downloaded_twice(project: Project, server: Server):
    server.files[PATH] = archive(member="other.ckpt")
    arguments = f"{CHECKPOINT}{server.url}{PATH}"
    project.refused("mnist5k", arguments, "'other.ckpt'", "checkpoint.member")
    project.refused(
        "mnist5k", f"{arguments} checkpoint.member=other.ckpt checkpoint.max_size=99", "checkpoint.max_size=99"
    )
    assert project.prepare("mnist5k", f"{arguments} checkpoint.member=other.ckpt").exit_code == 0
    assert gets(server) == [None]


def test_a_broken_download_goes_on_where_it_stopped(project: Project, server: Server):
    server.cut = [40_000, 30_000]
    result = project.prepare("mnist5k", f"{CHECKPOINT}{server.url}{PATH}")
    assert result.exit_code == 0, result.output
    assert gets(server) == [None, "bytes=40000-", "bytes=70000-"]
    assert (project.root / "data/cin256/model.ckpt").read_bytes() == WEIGHTS


def test_a_second_call_goes_on_where_the_first_gave_up(project: Project, server: Server, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    server.cut = [40_000]
    arguments = f"{CHECKPOINT}{server.url}{PATH}"
    project.refused("mnist5k", arguments, "ended after 40,000 of", "goes on where it stopped")
    assert project.prepare("mnist5k", arguments).exit_code == 0
    assert gets(server) == [None, "bytes=40000-"]


def test_a_server_without_ranges_begins_anew(tmp_path: Path, server: Server):
    server.cut, server.ranges = [40_000], False
    download.download(server.url + PATH, tmp_path / "a.zip", Events())
    assert gets(server) == [None, "bytes=40000-"]
    assert (tmp_path / "a.zip").read_bytes() == server.files[PATH]


@pytest.mark.parametrize("size", [100_000, 30_000])
def test_a_file_that_changed_between_two_calls_is_not_pieced_together(
    tmp_path: Path, server: Server, monkeypatch, size
):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    server.cut = [40_000]
    with pytest.raises(InputError, match="ended after"):
        download.download(server.url + PATH, tmp_path / "a.zip", Events())
    monkeypatch.setattr(download, "ATTEMPTS", 5)
    server.files[PATH] = os.urandom(size)
    download.download(server.url + PATH, tmp_path / "a.zip", Events())
    assert (tmp_path / "a.zip").read_bytes() == server.files[PATH]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip"]


def test_a_host_that_is_down_and_a_missing_file_are_one_line(project: Project, server: Server):
    project.refused("mnist5k", f"{CHECKPOINT}{server.url}/none.zip", "/none.zip: HTTP 404", "mirror")
    assert len(gets(server)) == 1
    project.refused("mnist5k", f"{CHECKPOINT}http://127.0.0.1:1/cin.zip", "http://127.0.0.1:1/cin.zip", "refused")
    assert project.shown() == []


def test_a_password_in_the_address_is_neither_shown_nor_recorded(project: Project, server: Server):
    url = f"{server.url}{PATH}".replace("//", "//user:secret@")
    assert "secret" not in project.refused("mnist5k", f"{CHECKPOINT}{url}x", "http")
    assert download.shown_url(url) == server.url + PATH


def test_a_download_with_another_hash_is_refused_and_the_recorded_one_is_checked_ever_after(
    project: Project,
    server: Server,
):
    arguments = f"{CHECKPOINT}{server.url}{PATH}"
    project.refused("mnist5k", f"{arguments} checkpoint.sha256={'f' * 64}", server.etag(PATH), "not the expected")
    assert project.shown() == []
    assert project.prepare("mnist5k", f"{arguments} checkpoint.sha256={server.etag(PATH)}").exit_code == 0
    project.commits.clear()
    model = project.root / "data/cin256/model.ckpt"
    model.write_bytes(WEIGHTS[:-1] + b"x")
    project.refused("mnist5k", arguments, "model.ckpt", "not the recorded")
    # the file is lost and the server now has another one: its hash is not the recorded one
    model.unlink()
    first, server.files[PATH] = server.files[PATH], archive(b"other")
    project.refused("mnist5k", arguments, "not the expected", server.etag(PATH))
    server.files[PATH] = first
    assert project.prepare("mnist5k", arguments).exit_code == 0
    assert model.read_bytes() == WEIGHTS


def test_whoever_reads_the_checkpoint_can_have_it_checked(project: Project, server: Server):
    from dp_lora.config import load

    overrides = f"{CHECKPOINT}{server.url}{PATH}"
    settings = load("mnist5k", {}, overrides).checkpoint
    folder = project.root / "data/cin256"
    with pytest.raises(InputError, match=r"missing; make it with the entry point prepare, or `dvc pull data/cin256`"):
        checked_checkpoint(folder, settings)
    project.prepare("mnist5k", overrides)
    assert checked_checkpoint(folder, settings) == (folder / "model.ckpt", digest_file(folder / "model.ckpt"))
    other = load("mnist5k", {}, f"{overrides} checkpoint.sha256={'e' * 64}").checkpoint
    with pytest.raises(InputError, match=r"not checkpoint\.sha256=eeee"):
        checked_checkpoint(folder, other)
