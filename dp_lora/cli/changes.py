"""Say which committed files a command changed, how to put them back, and which of them hold hashes of the data."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import click

from dp_lora.cli.pipelines import PIPELINES
from dp_lora.config import ROOT, relative


@contextmanager
def telling_changes() -> Iterator[None]:
    """At the end, say which params.yaml, dvc.lock and data.dvc this command changed and the last commit lacks."""
    files = [path for pipeline in PIPELINES.values() for path in (pipeline.params, pipeline.lock)]
    files.append(ROOT / "data.dvc")

    def contents() -> list[bytes | None]:
        return [path.read_bytes() if path.exists() else None for path in files]

    before = contents()
    try:
        yield
    finally:
        changed = [relative(path) for path, old, new in zip(files, before, contents(), strict=True) if old != new]
        if names := _not_committed(changed):
            back = f"`git checkout {' '.join(names)}` puts back what was committed"
            click.echo(f"changed by this command: {' and '.join(names)}; {back}", err=True)
        # also of a new file, which DVC advises to add to git
        if hashes := [name for name in changed if not name.endswith("params.yaml")]:
            click.echo(
                f"do not publish {' and '.join(hashes)} where data are private: their hashes are inside", err=True
            )


def _not_committed(names: list[str]) -> list[str]:
    if not names:
        return []
    command = ["git", "-C", str(ROOT), "diff", "--name-only", "--relative", "HEAD", "--", *names]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
