"""The one exception that users see as a single line."""

from collections.abc import Iterator
from contextlib import contextmanager

PRIVATE_PICTURE = "a private picture, or what names it, cannot be taken; the operator's terminal says which"


class InputError(ValueError):
    """Bad input: the message is one line that says what is wrong, where, and what to do.

    The message goes to the terminal. `public` is what a run's record may hold of it: the message, where none is stated.
    Whoever names a private file, person, caption or count in the message states a `public` text without it, such as
    "a private picture cannot be read". An error that this one stands for (`raise ... from`) is not recorded.
    """

    def __init__(self, message: str, public: str | None = None) -> None:
        super().__init__(message)
        self.stated = public

    @property
    def public(self) -> str:
        """The text that a run's record may hold."""
        return str(self) if self.stated is None else self.stated

    def __reduce__(self) -> tuple[type["InputError"], tuple[str, str | None]]:
        # an exception that comes out of a worker process is pickled: its args alone would lose `public`
        return type(self), (str(self), self.stated)


class SaidError(InputError):
    """Bad input that another process has told of on the terminal: the message is for the run's record alone."""


def shown(path: object) -> str:
    """A path in the form of a one-line message."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def line(error: Exception) -> str:
    """Another library's message in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


@contextmanager
def private_names(public: str) -> Iterator[None]:
    """Inside, private things are read: an InputError that states no text for the record is recorded as `public`.

    A function that reads private things has it as its decorator, so that no message which is added to it later can
    carry a private name into a record.
    """
    try:
        yield
    except InputError as error:
        if error.stated is None:
            error.stated = public
        raise
