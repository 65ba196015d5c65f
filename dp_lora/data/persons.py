"""One person, one name, one unit of privacy: second spellings and placeholders such as "nan" are refused.

A person in two spellings would be two units, and one unit's guarantee would not hold for the person. Nor would it for
people who share a unit called "nan": one who leaves changes this unit, but adjacency adds or removes whole units.
"""

import re
import unicodedata
from collections.abc import Iterable
from decimal import Decimal

from dp_lora.errors import PRIVATE_PICTURE, InputError, private_names

SHOWN = 5  # most faults that one message names
# texts by which tables mark a missing value (pandas' list, databases, spreadsheets), in the form of `comparable`
MISSING = frozenset(
    [
        *("", "nan", "-nan", "none", "na", "n/a", "n.a.", "<na>", "#na", "#n/a", "#n/a n/a", "null", "nil", "nat"),
        *("1.#ind", "-1.#ind", "1.#qnan", "-1.#qnan", "undefined", "unknown", "-", "--", "?"),
    ]
)
# invisible characters that Unicode calls letters, marks or symbols: fillers, joiners, variation selectors
UNSEEN = frozenset(
    map(
        chr,
        [
            *(0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0),
            *(*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)),
        ],
    )
)
APOSTROPHES = frozenset("\u2018\u2019\u02bc\u2032")  # word processors write these for '
# an exponent only as spreadsheets write it, with a sign: 1e3 may be an identifier
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]\d{1,4})?")


def comparable(person: str) -> str:
    """The form in which two spellings of one person are equal; a form to compare, not to show.

    Equal are: compatible characters (NFKC: full-width letters, composed accents), case, runs of blanks of any kind,
    surrounding blanks, invisible characters (format, control), kinds of dashes and apostrophes, and one number
    written as 1, 1.0, 01. Not equal are names that differ in letters, such as a nickname or a Cyrillic a.
    """
    # Unicode's compatibility caseless match (section 3.13), without invisible characters
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFD", person).casefold())
    text = "".join(map(_plain, text)).casefold()
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    return _number(text) if NUMBER.fullmatch(text) else text


def _plain(character: str) -> str:
    if character.isspace():
        return " "
    category = unicodedata.category(character)
    if category in ("Cf", "Cc") or character in UNSEEN:
        return ""
    if category == "Pd" or character == "\u2212":
        return "-"
    return "'" if character in APOSTROPHES else character


def _number(text: str) -> str:
    """A number's exact value at any length: digits without outer zeros, and their power of ten."""
    sign, digits, exponent = Decimal(text).as_tuple()
    written = "".join(map(str, digits)).lstrip("0")
    significant = written.rstrip("0")
    if not significant:
        return "0"
    return f"{'-' if sign else ''}{significant} * 10^{int(exponent) + len(written) - len(significant)}"


@private_names(PRIVATE_PICTURE)
def check_persons(named: Iterable[tuple[str, str]], table: str) -> None:
    """Raise InputError, one line, where a person has no name, or is spelled in more than one way.

    `named`: pairs of a place in the table (such as "line 3") and its person; the error names places and spellings,
    SHOWN at most.

    Guarantee: once it has returned, persons that are equal by `comparable` have equal names, so grouping by name puts
    them into one unit.
    """
    first: dict[str, str] = {}  # first place of each spelling
    for place, person in named:
        first.setdefault(person, place)
    spellings: dict[str, list[str]] = {}
    for person in first:
        spellings.setdefault(comparable(person), []).append(person)
    nameless = [_at(first, person) for key, found in spellings.items() if key in MISSING for person in found]
    if nameless:
        raise InputError(
            f"{table}: {_listed(nameless, ', ')}: tables write this where a name is missing; name the person, or leave "
            "the picture out (whoever has such a name needs another one here, such as 'Na 1')"
        )
    double = [", ".join(_at(first, person) for person in found) for found in spellings.values() if len(found) > 1]
    if double:
        raise InputError(
            f"{table}: one person in several spellings would be several units of privacy: {_listed(double, '; ')}; "
            "spell each in one way (two persons need names that differ in more than case, blanks or zeros)"
        )


def _at(first: dict[str, str], person: str) -> str:
    # code points where two spellings may look alike; blanks escaped, since a one-line message joins runs of them
    alike = unicodedata.normalize("NFKC", person) != person
    shown = ascii(person) if alike else repr(person)
    return f"{first[person]} " + shown.replace("  ", r"\x20\x20")


def _listed(faults: list[str], between: str) -> str:
    more = len(faults) - SHOWN
    return between.join(faults[:SHOWN]) + (f"{between}and {more} more" if more > 0 else "")
