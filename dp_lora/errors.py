"""The one exception that users see as a single line."""


class InputError(ValueError):
    """Bad input: the message is one line that says what is wrong, where, and what to do."""
