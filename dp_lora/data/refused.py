"""Refusals that name a private picture, file or person: they are for the terminal alone."""

from dp_lora.errors import PRIVATE_PICTURE, InputError


def refused(message: str) -> InputError:
    """An InputError whose message may name private pictures and persons; a run's record gets PRIVATE_PICTURE."""
    return InputError(message, public=PRIVATE_PICTURE)
