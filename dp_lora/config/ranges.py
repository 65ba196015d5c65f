"""Rules on a key's value: a test, and the words of its error."""

import math
import re
from collections.abc import Callable
from dataclasses import field
from typing import Any

from omegaconf import MISSING

Rule = tuple[Callable[[Any], bool], str]


def key(rule: Rule, default: Any = MISSING) -> Any:
    """A key whose values must keep `rule`; `rules.check` enforces it."""
    return field(default=default, metadata={"rule": rule})


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


POSITIVE: Rule = (lambda v: _number(v) and v > 0, "must be above 0")
NOT_NEGATIVE: Rule = (lambda v: _number(v) and v >= 0, "must be 0 or above")
AT_LEAST_1: Rule = (lambda v: v >= 1, "must be a whole number of at least 1")
SIDE: Rule = (lambda v: v in (8, 16, 32, 64, 128, 256, 512, 1024), "must be a power of two from 8 to 1024")
CHANNELS: Rule = (lambda v: v in (1, 3), "must be 1 or 3")
# a rank above a layer's width adds nothing
RANK: Rule = (lambda v: 1 <= v <= 1024, "must be a whole number from 1 to 1024")
SHARE: Rule = (lambda v: _number(v) and 0 <= v < 1, "must be in [0, 1)")
BETAS: Rule = (lambda v: len(v) == 2 and all(0 <= b < 1 for b in v), "must be two numbers in [0, 1)")
WIDTHS: Rule = (lambda v: len(v) >= 1 and all(w >= 1 for w in v), "must list at least one width of at least 1")


def one_of(*names: str) -> Rule:
    return (lambda v: v in names, f"must be one of {', '.join(names)}")


def hex_digits(digits: int) -> Callable[[str], bool]:
    return lambda v: re.fullmatch(rf"[0-9a-f]{{{digits}}}", v) is not None


FOLDER: Rule = (
    lambda v: v is None or re.fullmatch(r"data/[A-Za-z0-9][A-Za-z0-9_-]*", v) is not None,
    "must be null, or data/NAME",
)
MIRROR: Rule = (
    lambda v: v is None or v.startswith(("http://", "https://")),
    "must be null, or an address that begins with http",
)
SHA256: Rule = (lambda v: v is None or hex_digits(64)(v), "must be null, or 64 hex digits")
COMMIT: Rule = (lambda v: v is None or hex_digits(40)(v), "must be null, or a commit of 40 hex digits")
NULL_OR_AT_LEAST_1: Rule = (lambda v: v is None or v >= 1, "must be null, or a whole number of at least 1")
NULL_OR_TEXT: Rule = (lambda v: v is None or bool(v.strip()), "must be null, or a text")
MD5_SUMS: Rule = (lambda v: v is None or all(map(hex_digits(32), v)), "must be null, or a list of MD5 sums")


def _distinct(value: list[str]) -> bool:
    return len(value) >= 1 and len(set(value)) == len(value) and all(value)


CLASSES: Rule = (_distinct, "must list at least one class, and each once (none only with data.captions or data.prompt)")
OR_NONE: Rule = (lambda v: not v or _distinct(v), "must list each class once, or none")
