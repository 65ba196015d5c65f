"""One digest of the operator's folder of pictures: it changes when a picture is added, removed or changed."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dp_lora.data.folder import ListedPicture, list_pictures, shown
from dp_lora.errors import PRIVATE_PICTURE, InputError, private_names
from dp_lora.files import digest_file, digest_value


@private_names(PRIVATE_PICTURE)
def fingerprint(folder: Path, classes: Sequence[str], person_required: bool) -> str:
    """SHA-256 over everything that `prepare` would read: each picture's name, class, person and bytes; 64 hex digits.

    Bytes are read, since a picture that was changed in place may have its old size and time. The digest depends on
    private pictures and is not keyed: it must go into no file. Raises InputError as `list_pictures` does, and for a
    picture that cannot be read.
    """
    pictures = list_pictures(folder, classes, person_required)

    def row(picture: ListedPicture) -> list[str | None]:
        path = folder / picture.file_name
        try:
            return [picture.file_name, picture.label, picture.person, digest_file(path)]
        except OSError as error:
            raise InputError(f"{shown(path)}: cannot be read: {error.strerror}") from None

    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        return digest_value(list(pool.map(row, pictures)))
