"""What users type: overrides taken apart, and the name that a wrong one was perhaps meant to be."""

import difflib
import re
from collections.abc import Iterable

# a blank inside of brackets, braces or quotes ends no override; one that is not closed is read as letters
OVERRIDE = re.compile(r"""(?:\[[^\[\]]*\]|\{[^{}]*\}|"(?:\\.|[^"\\])*"|'[^']*'|\S)+""")
MOST = 3  # guesses


def split_overrides(text: str) -> list[str]:
    """The overrides of a text with blanks between: `data.classes=[cat, dog] data.path="my pictures"` are two."""
    return OVERRIDE.findall(text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean A or B?` where names of `known` are like `word`, the likeliest first; else nothing."""
    close = difflib.get_close_matches(word, list(known), MOST)
    return f"; did you mean {' or '.join(close)}?" if close else ""
