"""User input: splits overrides, and suggests names for a misspelt one."""

import difflib
import re
from collections.abc import Iterable

# a blank inside brackets, braces or quotes ends no override; an unclosed bracket or quote is a plain letter
OVERRIDE = re.compile(r"""(?:\[[^\[\]]*\]|\{[^{}]*\}|"(?:\\.|[^"\\])*"|'[^']*'|\S)+""")
MOST = 3  # most guesses


def split_overrides(text: str) -> list[str]:
    """The overrides of a text with blanks between: `data.classes=[cat, dog] data.path="my pictures"` are two."""
    return OVERRIDE.findall(text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean A or B?` where names of `known` are like `word`, the likeliest first; else nothing."""
    close = difflib.get_close_matches(word, list(known), MOST)
    return f"; did you mean {' or '.join(close)}?" if close else ""
