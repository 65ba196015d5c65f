"""Class lists as a config writes them."""

import re
from collections.abc import Sequence

from dp_lora.errors import InputError

MOST_CLASSES = 100_000


def class_names(classes: Sequence[str]) -> list[str]:
    """`public.classes` with every entry A..B as the whole numbers from A to B: a thousand classes in one word."""
    names: list[str] = []
    for entry in classes:
        if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", entry):
            first, last = (int(number) for number in numbers.groups())
            if not first <= last < first + MOST_CLASSES:
                raise InputError(f"public.classes={entry}: must go upwards, over at most {MOST_CLASSES} numbers")
            names += [str(number) for number in range(first, last + 1)]
        else:
            names.append(entry)
    return names
