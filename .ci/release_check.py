#!/usr/bin/env python3
"""Everything that a release must pass, in a fresh clone of the last commit; prints a table and each step's time.

`.ci/release_check.py [FOLDER]`: the clone goes to FOLDER/dp-lora (a temporary folder, removed at the end, where none is
given). It needs the standard library alone. Exit status 1 where a step failed.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# make targets, in this order
STEPS = ("setup", "lint", "quickstart", "test", "test-container", "test-ui", "test-slow", "bench")


def check(folder: Path) -> bool:
    """Run every step, also after one that failed; whether all passed."""
    clone = folder / "dp-lora"
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", ROOT, clone], check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=clone, check=True, capture_output=True, text=True)
    # a virtual environment or a store of the caller's would stand in for what the clone has to make itself
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "VIRTUAL_ENV"))}
    rows, passed = [], True
    for step in STEPS:
        print(f"\n== make {step}", flush=True)
        began = time.monotonic()
        status = subprocess.run(["make", step], cwd=clone, env=kept, check=False).returncode
        rows.append(
            f"| `make {step}` | {'passed' if status == 0 else f'FAILED ({status})'} "
            f"| {(time.monotonic() - began) / 60:.1f} |"
        )
        passed = passed and status == 0
    print(f"\ncommit {commit.stdout.strip()}, {os.cpu_count()} cores\n")
    print("| step | result | minutes |\n| --- | --- | --- |", *rows, sep="\n")
    return passed


if __name__ == "__main__":
    if len(sys.argv) > 1:
        target = Path(sys.argv[1]).resolve()
        if (target / "dp-lora").exists():
            sys.exit(f"error: {target / 'dp-lora'} is there already; name another folder")
        target.mkdir(parents=True, exist_ok=True)
        sys.exit(not check(target))
    with tempfile.TemporaryDirectory(prefix="dp-lora-release-") as name:
        sys.exit(not check(Path(name)))
