"""One trial: fine-tune, sample and score with given settings, by the project's own commands; finished ones are kept."""

import hashlib
import subprocess
import sys
import time
from pathlib import Path

from dp_lora.config import ROOT
from dp_lora.files import read_json

RUNS = ROOT / "runs" / "trials"


def trial(config: str, eps: str, seed: int, overrides: str = "") -> dict[str, float]:
    """Scores of one trial, by name; read from its folder where it has been run before."""
    key = hashlib.sha256(f"{config}|{eps}|{seed}|{overrides}".encode()).hexdigest()[:12]
    folder = RUNS / f"{config}-eps{eps or 'own'}-seed{seed}-{key}"
    scores = folder / "evaluation" / "metrics.json"
    if not scores.exists():
        began = time.monotonic()
        common = ["--config", config, "--overrides", overrides]
        _run("finetune", *common, "--eps", eps, "--seed", str(seed), "--out", str(folder / "finetune"))
        adapter = str(folder / "finetune")
        samples = str(folder / "samples")
        _run("sample", *common, "--seed", str(seed), "--adapter", adapter, "--out", samples)
        _run("fid", *common, "--samples", samples, "--out", str(folder / "evaluation"))
        print(f"{folder.name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return read_json(scores)


def _run(entry_point: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", f"entrypoints.{entry_point}", *arguments], cwd=ROOT, check=True)


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
