"""README and docs/: links work, commands and keys exist, pages are short, no text stands twice."""

import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

from dp_lora.__main__ import OTHERS
from dp_lora.config import ROOT, STAGES, config_names, filed
from dp_lora.config.words import NO_KEY, OTHER_NAMES

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in (README, *DOCS)}
CONFIGS_README = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
MAX_LINES = {"README.md": 150}  # any other page has 200
MAX_WIDTH = 128  # of a paragraph's line: with longer lines the limit of five lines would mean nothing
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
KEYS = set(filed("mnist5k"))
SECTIONS = {key.split(".")[0] for key in KEYS}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")


def prose(text):
    """A page without its fenced blocks."""
    return FENCE.sub("", text)


def paragraphs(text):
    """The lines of each paragraph, or of each item of a list; leaves out tables and headings."""
    found = [[]]
    for line in prose(text).splitlines():
        if not line.strip() or line.startswith(("#", "|")):
            found.append([])
        elif re.match(r" *- ", line):
            found.append([line])
        else:
            found[-1].append(line)
    return [lines for lines in found if lines]


def cells(text):
    return [cell.strip() for line in prose(text).splitlines() if line.startswith("|") for cell in line.split("|")]


def sentences(text):
    texts = [" ".join(" ".join(lines).split()).removeprefix("- ") for lines in paragraphs(text)] + cells(text)
    return [one for part in texts for one in re.split(r"(?<=[.:?!])\s+(?=[A-Z`\[])", part) if one]


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


def anchors(text):
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", prose(text), flags=re.MULTILINE)}


def commands(text):
    """The words of each command in the fenced shell blocks."""
    for language, block in FENCE.findall(text):
        if language == "sh":
            for line in block.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    yield words


def broken_links(name, text):
    here = (ROOT / name).parent
    for link in LINK.findall(text):
        if not link.startswith(("https://", "http://")):
            path, _, anchor = link.partition("#")
            target = (here / path).resolve() if path else ROOT / name
            if not target.exists():
                yield f"{link}: no such file"
            elif anchor and anchor not in anchors(target.read_text(encoding="utf-8") if path else text):
                yield f"{link}: no such heading"


def unknown_targets(text):
    typed = [words[1] for words in commands(text) if words[0] == "make"]
    return {target for target in [*re.findall(r"`make ([a-z-]+)", text), *typed] if target not in TARGETS}


def faults_of_values(entry, values):
    """Faults in the parameters of one call of an entry point; each parameter is (name, text)."""
    for name, value in values:
        if name not in STAGES[entry].parameters:
            yield f"{entry}: no parameter {name}"
        elif name == "config" and value not in config_names():
            yield f"{entry}: no config {value}"
        elif name == "overrides":
            keys = {word.partition("=")[0] for word in value.split()}
            yield from (f"{entry}: no key {key}" for key in sorted(keys - KEYS))


MODULE = ["-m", "dp_lora"]


def faults_of_command(words):
    """Missing things that a command names: entry points, modules, parameters, configs, keys."""
    if "run" in words and words[0].endswith("mlflow"):
        entry = words[words.index("-e") + 1]
        values = [words[i + 1].partition("=")[::2] for i, word in enumerate(words) if word == "-P"]
    elif Path(words[0]).name == "dp-lora" or MODULE in [words[i : i + 2] for i in range(len(words))]:
        entry, *given = words[1:] if MODULE[1] not in words else words[words.index(MODULE[1]) + 1 :]
        values = [
            (word[2:], given[i + 1]) for i, word in enumerate(given) if word.startswith("--") and word != "--dry-run"
        ]
        if entry in OTHERS:
            return []
    elif "-m" in words:
        module = words[words.index("-m") + 1]
        ours = (ROOT / module.split(".")[0]).exists()
        return [f"no module {module}"] if ours and not (ROOT / f"{module.replace('.', '/')}.py").exists() else []
    else:
        return []
    return list(faults_of_values(entry, values)) if entry in STAGES else [f"no entry point {entry}"]


def unknown_keys(text):
    """Keys that a page names in code, but that the configuration does not have."""
    named = [re.match(r"([a-z_]+)\.([a-z_0-9]+)(?==|$)", code) for code in CODE.findall(prose(text))]
    files = ("ckpt", "dvc", "json")
    return {m[0] for m in named if m and m[1] in SECTIONS and m[0] not in KEYS and m[2] not in files}


def missing_files(text):
    """Code files that a page names, but that do not exist; privacy/step.py means the one in dp_lora."""
    named = [one for one in CODE.findall(prose(text)) if re.fullmatch(r"\.?[a-z][\w/.-]*/[\w.-]+\.(py|sh|yaml)", one)]
    yield from (name for name in named if not any((ROOT / room / name).exists() for room in ("", "dp_lora")))


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files_and_headings(name):
    assert list(broken_links(name, PAGES[name])) == []


def test_links_of_the_table_of_experiments_lead_somewhere_too():
    assert list(broken_links("configs/README.md", CONFIGS_README)) == []


@pytest.mark.parametrize("name", PAGES)
def test_commands_keys_and_files_that_a_page_names_are_there(name):
    text = PAGES[name]
    assert unknown_targets(text) == set()
    assert [fault for words in commands(text) for fault in faults_of_command(words)] == []
    assert unknown_keys(text) == set()
    assert list(missing_files(text)) == []


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_short_and_its_paragraphs_and_sentences_are(name):
    text = PAGES[name]
    assert len(text.splitlines()) <= MAX_LINES.get(name, 200)
    assert [lines[0] for lines in paragraphs(text) if len(lines) > 5] == []
    assert [line for lines in paragraphs(text) for line in lines if len(line) > MAX_WIDTH] == []
    assert [sentence for sentence in sentences(text) if sentence.count(";") > 1] == []


def test_readme_links_every_page():
    linked = set(LINK.findall(PAGES["README.md"]))
    assert [name for name in PAGES if name != "README.md" and name not in linked] == []


def test_readme_has_the_two_commands():
    assert [words[1] for words in commands(PAGES["README.md"]) if words[0] == "make"] == ["quickstart", "test"]


def said_twice(texts):
    # a cell that lists parameters is no sentence
    plain = [one for text in texts for one in sentences(text) if re.search("[a-z]", CODE.sub("", one))]
    counted = Counter(one for one in plain if len(one) >= 60)
    return [one for one, count in counted.items() if count > 1]


def test_no_sentence_and_no_command_stands_twice():
    assert said_twice([*PAGES.values(), CONFIGS_README]) == []
    calls = Counter(shlex.join(words) for text in PAGES.values() for words in commands(text) if "-P" in words)
    assert [call for call, count in calls.items() if count > 1] == []


BAD = """# A page
See [one](docs/nowhere.md), [two](#no-heading) and [three](#a-page).

Five lines are not six, and this sentence of more than sixty characters stands here twice.
Two; semicolons; are too many
three
four
five
six

`make nothing` sets `privacy.epz=1` in `privacy/nowhere.py`, as `privacy.eps=1` in `privacy/step.py`.

- Five lines are not six, and this sentence of more than sixty characters stands here twice.

```sh
make nought
.venv/bin/mlflow run . -b native -e finetun -P eps=5
.venv/bin/mlflow run . -b native -e sample -P eps=5 -P config=mnist6k -P overrides='privacy.k=1 \\
  privacy.kk=1'
.venv/bin/dp-lora finetune --config mnist5k --dry-run --epz 1
.venv/bin/python -m benchmarks.nothing
```
"""


def test_the_table_of_diffusers_names_says_what_errors_say():
    page = (ROOT / "docs/bases.md").read_text(encoding="utf-8")
    _, _, section = page.partition("### Names from diffusers' training scripts")
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", section.partition("\n## ")[0], re.MULTILINE)
    keys = {name: f"`{key}`" for name, key in OTHER_NAMES.items()}
    assert dict(rows) == keys | {name: f"none: {why}" for name, why in NO_KEY.items()}
    assert len(rows) == len(keys) + len(NO_KEY)


def test_each_fault_is_seen():
    assert list(broken_links("README.md", BAD)) == ["docs/nowhere.md: no such file", "#no-heading: no such heading"]
    assert unknown_targets(BAD) == {"nothing", "nought"}
    assert unknown_keys(BAD) == {"privacy.epz"}
    assert list(missing_files(BAD)) == ["privacy/nowhere.py"]
    assert [fault for words in commands(BAD) for fault in faults_of_command(words)] == [
        "no entry point finetun",
        "sample: no parameter eps",
        "sample: no config mnist6k",
        "sample: no key privacy.kk",
        "finetune: no parameter epz",
        "no module benchmarks.nothing",
    ]
    assert [len(lines) for lines in paragraphs(BAD)] == [1, 6, 1, 1]
    assert [one for one in sentences(BAD) if one.count(";") > 1]
    assert len(said_twice([BAD])) == 1


@pytest.mark.parametrize(
    ("heading", "words"),
    [
        ("Units", ("Copies", "two spellings", "`data.duplicates=refuse`", "as a group alone")),
        ("Rollback", ("backup", "`runs/.heads`", "another machine", "`ledger_head`")),
        ("Base model", ("`privacy_status`", "at its word")),
        ("Rounding", ("assumes", "dummy pictures", "refuses to train")),
        ("Operator only", ("Times carry no guarantee", "`system/`")),
        ("Records", ("A second run of `prepare`", "put nothing private into it")),
        ("Several ranks", ("unencrypted",)),
    ],
)
def test_the_threat_model_says_what_nobody_can_see_or_takes_on_trust(heading, words):
    page = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8")
    section = page.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    text = " ".join(section.split())
    assert [word for word in words if word not in text] == []
