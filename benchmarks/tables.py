"""The benchmarks' tables, and the folder for their reports."""

from pathlib import Path

from dp_lora.config import ROOT

RUNS = ROOT / "runs" / "trials"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def write_report(name: str, text: str) -> Path:
    path = RUNS / f"{name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(text)
    return path
