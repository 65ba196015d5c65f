"""What lies in the operator's folder of pictures now, as one digest: it differs when one was taken out or changed."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dp_lora.data.captions import Entry
from dp_lora.data.folder import list_pictures
from dp_lora.data.metadata_table import Stated
from dp_lora.data.refused import refused, shown
from dp_lora.files import digest_file, digest_value


def fingerprint(folder: Path, stated: Stated) -> str:
    """SHA-256 over all that `prepare` would read: each picture's name, class, person, captions, bytes; 64 hex digits.

    Bytes are read, since a picture that was changed in place may have its old size and time. The digest depends on
    private pictures and is not keyed: it must go into no file. Raises InputError as `list_pictures` does, and for a
    picture that cannot be read.
    """
    entries = list_pictures(folder, stated).entries

    def row(entry: Entry) -> list[Any]:
        path = folder / entry.file_name
        captions = [] if entry.captions is None else [entry.captions]
        try:
            return [entry.file_name, entry.label, entry.person, digest_file(path), *captions]
        except OSError as error:
            raise refused(f"{shown(path)}: cannot be read: {error.strerror}") from None

    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter
        return digest_value(list(pool.map(row, entries)))
