"""One trial: fine-tune, sample and score with given settings, by the project's own commands; finished ones are kept."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from dp_lora.config import ROOT, flatten, load
from dp_lora.files import digest_file, digest_value, read_json
from dp_lora.training.run_folder import code_digest

RUNS = ROOT / "runs" / "trials"


class Trial(NamedTuple):
    """What is fine-tuned, sampled and scored."""

    config: str
    eps: str
    seed: int
    overrides: str = ""

    @property
    def folder(self) -> Path:
        """Named by all that decides the result: settings and code."""
        resolved = flatten(load(self.config, {"eps": self.eps, "seed": str(self.seed)}, self.overrides))
        rooms = [ROOT / "dp_lora" / room for room in ("training", "sampling", "evaluation")]
        code = [digest_file(source) for room in rooms for source in sorted(room.glob("*.py"))]
        key = digest_value([{name: str(value) for name, value in resolved.items()}, code_digest(), code])[:12]
        return RUNS / f"{self.config}-eps{self.eps}-seed{self.seed}-{key}"


def scores(trials: Sequence[Trial], jobs: int) -> dict[Trial, dict[str, float]]:
    """Scores of every trial, by name; `jobs` at a time, which share the processor's cores; finished ones are read."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    for config in {trial.config for trial in trials}:
        # upstream is made once, before several trials would make it at once
        if not (ROOT / "outputs" / config / "data").exists():
            _score(next(trial for trial in trials if trial.config == config), threads)
    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(trials, pool.map(lambda trial: _score(trial, threads), trials), strict=True))


def _score(trial: Trial, threads: int) -> dict[str, float]:
    folder = trial.folder
    metrics = folder / "evaluation" / "metrics.json"
    if not metrics.exists():
        began = time.monotonic()
        common = ["--config", trial.config, "--overrides", trial.overrides]
        adapter, samples = str(folder / "finetune"), str(folder / "samples")
        _run(threads, "finetune", *common, "--eps", trial.eps, "--seed", str(trial.seed), "--out", adapter)
        _run(threads, "sample", *common, "--seed", str(trial.seed), "--adapter", adapter, "--out", samples)
        _run(threads, "fid", *common, "--samples", samples, "--out", str(metrics.parent))
        print(f"{folder.name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return read_json(metrics)


def _run(threads: int, entry_point: str, *arguments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "dp_lora", entry_point, *arguments]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


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
