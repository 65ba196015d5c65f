"""Refusals that name a private picture, file or person: they are for the terminal alone."""

from dp_lora.errors import PRIVATE_PICTURE, InputError


def refused(message: str) -> InputError:
    """An InputError whose message may name private pictures and persons; a run's record gets PRIVATE_PICTURE."""
    return InputError(message, public=PRIVATE_PICTURE)


def shown(path: object) -> str:
    """A path as it can stand in a one-line message."""
    text = str(path)
    return text if text.isprintable() else repr(text)
