"""Refusals that name a private picture, file or person: they are for the terminal alone."""

from dp_lora.errors import InputError

PUBLIC = "a private picture is refused; the terminal says which, and why"


def refused(message: str) -> InputError:
    """An InputError whose message may name private pictures and persons; a run's record gets PUBLIC in its place."""
    return InputError(message, public=PUBLIC)
