"""One digest of the operator's folder of pictures: it changes when a picture is added, removed or changed."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dp_lora.data.captions import ListedPicture
from dp_lora.data.folder import list_pictures
from dp_lora.data.metadata_table import Stated
from dp_lora.errors import PRIVATE_PICTURE, InputError, private_names, shown
from dp_lora.files import digest_file, digest_value


@private_names(PRIVATE_PICTURE)
def fingerprint(folder: Path, stated: Stated) -> str:
    """SHA-256 over all that `prepare` would read: each picture's name, class, person, captions, bytes; 64 hex digits.

    Bytes are read: a picture changed in place may keep its size and time. The digest depends on private pictures and
    is not keyed: never write it to a file. Raises InputError as `list_pictures` does, and for a picture that cannot
    be read.
    """
    pictures = list_pictures(folder, stated).pictures

    def row(picture: ListedPicture) -> list[Any]:
        path = folder / picture.file_name
        captions = [] if picture.captions is None else [picture.captions]
        try:
            return [picture.file_name, picture.label, picture.person, digest_file(path), *captions]
        except OSError as error:
            raise InputError(f"{shown(path)}: cannot be read: {error.strerror}") from None

    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        return digest_value(list(pool.map(row, pictures)))
