"""One expected file out of a zip archive from the internet; the whole archive is checked first."""

import stat
import zipfile
import zlib
from pathlib import Path

from dp_lora.errors import InputError
from dp_lora.files import naming_full_disk
from dp_lora.progress import progress

MAX_RATIO = 50  # weights compress to a half at best; a ratio above this is a decompression bomb
CHUNK = 1 << 20
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class OtherMember(InputError):
    """The archive may be good: another value in the config would accept it unchanged."""


def extract_member(archive: Path, member: str, target: Path, max_size: int, name: str) -> None:
    """Write the archive's only file, `member`, to `target`.

    Raises InputError, one line that begins with `name` (what users call the archive), for anything else in it: another
    name or path, a link, a second file, encryption, a size that is too large or wrongly declared, a bad checksum.
    OtherMember where another checkpoint.member or checkpoint.max_size would accept the archive.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            info = _checked(file.infolist(), member, max_size, name)
            _extract(file, info, target, name)
    # a damaged archive raises almost any of these
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        cause = " ".join(str(error).split()) or "it ends too early"
        raise InputError(f"{name}: not a whole zip archive: {cause}; get it again, or from a mirror") from None


def _checked(infos: list[zipfile.ZipInfo], member: str, max_size: int, name: str) -> zipfile.ZipInfo:
    for info in infos:
        shown = repr(info.orig_filename)
        if stat.S_ISLNK(info.external_attr >> 16):
            raise InputError(f"{name}: {shown} is a link, so the archive is refused")
        if info.orig_filename != member:
            other = OtherMember if len(infos) == 1 else InputError
            raise other(f"{name}: holds {shown}; only {member!r} is expected (checkpoint.member), so it is refused")
    if len(infos) != 1:
        found = f"{member!r} {len(infos)} times" if infos else "no file"
        raise InputError(f"{name}: holds {found}; {member!r} once is expected, the archive is refused")
    info = infos[0]
    if info.flag_bits & 1 or info.compress_type not in METHODS:
        raise InputError(f"{name}: {member!r} is encrypted or packed in an unknown way; the archive is refused")
    if info.file_size > max_size:
        raise OtherMember(f"{name}: {member!r} has {info.file_size:,} bytes, above checkpoint.max_size={max_size}")
    if info.file_size > MAX_RATIO * max(info.compress_size, CHUNK // MAX_RATIO):
        raise InputError(
            f"{name}: {member!r} grows from {info.compress_size:,} to {info.file_size:,} bytes; the archive is refused"
        )
    return info


def _extract(file: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, name: str) -> None:
    written = 0
    with (
        naming_full_disk(target),
        file.open(info) as source,
        target.open("wb") as out,
        progress(total=info.file_size, unit="B", unit_scale=True, desc=info.filename) as shown,
    ):
        # read() stops at the declared size and then compares the checksum
        while chunk := source.read(CHUNK):
            out.write(chunk)
            written += len(chunk)
            shown.update(len(chunk))
    if written != info.file_size:
        raise InputError(f"{name}: {info.filename!r} has {written:,} bytes, not {info.file_size:,}; get it again")
