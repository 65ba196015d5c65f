"""One person, one name: spellings that read as one name are one unit of privacy, or are refused with their lines."""

import pytest

from dp_lora.data.persons import MISSING, check_persons, comparable
from dp_lora.errors import PRIVATE_PICTURE, InputError

ONE_PERSON = {
    "case": ["Ann", "ann", "ANN"],
    "blanks": ["Ann Lee", "Ann  Lee", "Ann\u00a0Lee", " Ann\tLee\u3000", "Ann\u2009Lee", "Ann\nLee"],
    "width": ["Ann", "\uff21\uff4e\uff4e"],
    "format characters": ["Ann", "A\u200bnn", "\ufeffAnn", "Ann\u200d", "A\u00adnn", "Ann\u202c", "Ann\U000e0061"],
    "other unseen characters": ["Ann", "A\ufe0fnn", "An\u034fn", "Ann\u3164", "Ann\u2800", "A\x07nn", "Ann\U000e0100"],
    "accents": ["Zo\u00eb", "Zoe\u0308", "ZO\u00cb", "Zoe\u200d\u0308"],
    "ligatures": ["Fi", "\ufb01", "FI"],
    "sharp s": ["Stra\u00dfe", "STRASSE", "Stra\u1e9ee"],
    "iota below": ["\u1fb3", "\u03b1\u0345", "\u0391\u0399"],
    "dashes": ["A-B", "A\u2010B", "A\u2011B", "A\u2013B", "a\u2212b", "A\ufe63B"],
    "apostrophes": ["O'Neil", "O\u2019Neil", "o\u02bcneil"],
    "numbers": ["1", "1.0", "01", "1.", "+1", "1.00", "\uff11", "\u0661", "1e+0", "10e-1"],
    "zeros": ["0", "0.0", "00", "-0", ".0", "0e+05"],
    "numbers from a spreadsheet": ["120000000000", "1.2E+11", "120000000000.0"],
    "long numbers": ["1" * 40, "0" + "1" * 40, "1" * 40 + ".0"],
}
TWO_PERSONS = [
    ("Ann", "Anne"), ("Ann Lee", "AnnLee"), ("Ann", "\u0410nn"), ("1", "10"), ("1", "-1"), ("1.5", "15"), ("1", "1a"),
    ("1" * 40 + "2", "1" * 40 + "3"), ("1e3", "1000"), ("0e12", "0e34"), ("1_0", "10"), ("Ann", "Ann 1"), ("1,0", "10"),
    ("1e+3", "1e+4"), ("e", "\u00e9"),
]  # fmt: skip


def _refused(named: list[tuple[str, str]]) -> str:
    with pytest.raises(InputError) as caught:
        check_persons(named, "table")
    assert caught.value.public == PRIVATE_PICTURE
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("names", ONE_PERSON.values(), ids=ONE_PERSON)
def test_spellings_of_one_person_are_refused_each_with_its_line(names: list[str]) -> None:
    assert len({comparable(name) for name in names}) == 1
    for number, name in enumerate(names[1:], start=3):
        message = _refused([("line 2", names[0]), (f"line {number}", name)])
        assert "line 2 " in message
        assert f"line {number} " in message


@pytest.mark.parametrize(("one", "other"), TWO_PERSONS)
def test_names_that_differ_in_letters_are_two_persons(one: str, other: str) -> None:
    assert comparable(one) != comparable(other)
    check_persons([("line 2", one), ("line 3", other), ("line 4", one)], "table")


@pytest.mark.parametrize("name", ["nan", "NaN", "None", "NA", "null", "n/a", "N/A", "", " ", "\u200b", "<NA>", "#N/A"])
def test_what_stands_for_a_missing_name_is_refused_with_its_line(name: str) -> None:
    assert comparable(name) in MISSING
    message = _refused([("line 2", "Ann"), ("line 3", name)])
    assert f"line 3 {name!a}" in message
    assert "line 2" not in message


def test_missing_is_written_in_the_form_that_is_compared() -> None:
    assert {comparable(name) for name in MISSING} - MISSING == set()


def test_spellings_that_look_alike_are_shown_apart() -> None:
    message = _refused([("line 2", "Kim"), ("line 3", "\u212aim"), ("line 4", "K\u200bim"), ("line 5", "Kim")])
    assert "line 2 'Kim', line 3 '\\u212aim', line 4 'K\\u200bim'" in message
    message = _refused([("line 2", "Ann Lee"), ("line 3", "Ann  Lee")])
    assert "line 2 'Ann Lee', line 3 'Ann\\x20\\x20Lee'" in message


def test_of_many_faults_the_first_few_are_named_and_the_rest_counted() -> None:
    many = [(f"line {2 * n + side}", f"{'pP'[side]} {n}") for n in range(1000) for side in (0, 1)]
    message = _refused(many)
    assert "line 0 'p 0', line 1 'P 0'; " in message
    assert "and 995 more" in message
    assert len(message) < 600


def test_a_person_of_many_pictures_is_one_line_of_the_refusal() -> None:
    message = _refused([(f"line {n}", "Ann" if n % 2 else "ann") for n in range(2, 200)])
    assert message.count("line ") == 2
