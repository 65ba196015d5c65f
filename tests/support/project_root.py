"""A folder as the project's root, for commands that a test calls in its own process."""

from pathlib import Path

import pytest

from tests.support.tracking_store import use_store

ROOTS = ("config.paths", "tracking.tracked_run", *(f"cli.{name}" for name in ("adapters", "pipelines", "record")))
RUNS = ("commands.finetune", *(f"cli.{name}" for name in ("common", "finetuning", "record")))
WORKING = ("commands.audit", "commands.fid", "cli.prepared")


def use_root(root: Path, patch: pytest.MonkeyPatch):
    """Let the project's commands find and keep everything below `root`, with a store of its own; returns a client."""
    client = use_store(root, patch)
    for names, name, folder in ((ROOTS, "ROOT", root), (RUNS, "RUNS", root / "runs")):
        for module in names:
            patch.setattr(f"dp_lora.{module}.{name}", folder)
    for module in WORKING:
        patch.setattr(f"dp_lora.{module}.WORKING", root / "runs/working")
    return client
