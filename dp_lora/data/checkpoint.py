"""The original checkpoint that import_base converts: downloaded, unpacked, and from then on checked by its hash.

Nothing here opens the checkpoint itself, which is a pickle.
"""

from pathlib import Path

from dp_lora.config.schema import Checkpoint
from dp_lora.data.download import download, shown_url
from dp_lora.data.unzip import OtherMember, extract_member
from dp_lora.data.versioned import check_space, read_source, unfinished, write_source
from dp_lora.errors import InputError
from dp_lora.events import Events
from dp_lora.files import digest_file, digest_value, whole_folder


def prepare_checkpoint(settings: Checkpoint, folder: Path, events: Events) -> None:
    """Fill `folder` with the checkpoint and source.json, whole or not at all.

    An existing folder is checked against its source.json, and nothing is downloaded. An interrupted download resumes.
    Raises InputError, one line, for a wrong address, archive or hash.
    """
    assert settings.url is not None
    name = shown_url(settings.url)
    with unfinished(folder) as part:
        recorded = read_source(folder)
        if recorded is not None and (folder / settings.member).exists():
            checked_checkpoint(folder, settings)
            events.message(f"{folder}: exists, and its hash is the recorded one")
            return
        expected = settings.sha256 or (recorded or {}).get("sha256")
        local = not settings.url.startswith(("http://", "https://"))
        archive = _on_disk(settings.url) if local else part / f"{digest_value(settings.url)[:16]}.zip"
        if not archive.exists():
            download(settings.url, archive, events)
        try:
            digest = digest_file(archive)
            if expected is not None and digest != expected:
                raise InputError(f"{name}: its sha256 is {digest}, not the expected {expected}; find the right file")
            with whole_folder(folder) as temporary:
                target = temporary / settings.member
                check_space(folder, archive.stat().st_size)
                extract_member(archive, settings.member, target, settings.max_size, name)
                facts = {"origin": name, "url": name, "size": archive.stat().st_size, "sha256": digest}
                member = {"name": settings.member, "size": target.stat().st_size, "sha256": digest_file(target)}
                write_source(temporary, facts | {"file": member})
        except InputError as error:
            # the next call must not find the same bad archive
            if not local and not isinstance(error, OtherMember):
                archive.unlink()
            raise
    events.message(f"{folder}: {settings.member} from {name}, sha256 of the download {digest}")


def _on_disk(url: str) -> Path:
    path = Path(url.removeprefix("file://"))
    if not path.is_file():
        raise InputError(f"checkpoint.url={url}: no such file; it is an address (http, https) or a file on disk")
    return path


def checked_checkpoint(folder: Path, settings: Checkpoint) -> tuple[Path, str]:
    """The checkpoint's path and SHA-256, after its bytes were compared with the hash recorded at first use.

    Raises InputError where the folder or the recorded hash is missing, and where the hash differs.
    """
    recorded = read_source(folder)
    path = folder / settings.member
    again = "remove the folder and prepare it again, or `dvc checkout` it"
    if recorded is None or not path.is_file():
        raise InputError(f"{path}: missing; make it with the entry point prepare, or `dvc pull data/{folder.name}`")
    try:
        wanted = recorded["file"]["sha256"]
        download_digest = recorded["sha256"]
    except (KeyError, TypeError):
        raise InputError(f"{folder}/source.json: no hash of {settings.member}; {again}") from None
    if settings.sha256 is not None and settings.sha256 != download_digest:
        raise InputError(
            f"{folder}: was made from a download of sha256 {download_digest}, not checkpoint.sha256="
            f"{settings.sha256}; {again}"
        )
    found = digest_file(path)
    if found != wanted:
        raise InputError(f"{path}: its sha256 is {found}, not the recorded {wanted}; {again}")
    return path, found
