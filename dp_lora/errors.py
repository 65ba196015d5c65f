"""The one exception that users see as a single line."""


class InputError(ValueError):
    """Bad input: the message is one line that says what is wrong, where, and what to do.

    The message goes to the terminal. `public` is what a run's record may hold of it: the message, where none is given.
    Whoever names a private file, person, caption or count in the message gives a `public` text without it, such as
    "a private picture cannot be read". An error that this one stands for (`raise ... from`) is not recorded.
    """

    def __init__(self, message: str, public: str | None = None) -> None:
        super().__init__(message)
        self.public = message if public is None else public

    def __reduce__(self) -> tuple[type["InputError"], tuple[str, str]]:
        # an exception that comes out of a worker process is pickled: its args alone would lose `public`
        return type(self), (str(self), self.public)
