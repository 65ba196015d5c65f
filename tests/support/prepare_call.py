"""The command `prepare` in this process, with a project folder of the test's own."""

import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

CHECKPOINT = "checkpoint.folder=data/cin256 checkpoint.url="


class Project:
    """A project's root; `commits` lists the calls of DVC, which does not run here (see tests/test_prepare_dvc.py)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.commits: list[tuple[str, ...]] = []

    def prepare(self, config: str, overrides: str = "") -> Result:
        from dp_lora.commands.prepare import main

        return CliRunner().invoke(main, ["--config", config, "--overrides", overrides])

    def refused(self, config: str, overrides: str, *words: str) -> str:
        """Check that `prepare` ends with one line that has all `words`, and records nothing; gives the line."""
        result = self.prepare(config, overrides)
        assert result.exit_code == 1, result.output
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert result.stderr.rstrip().splitlines()[-1] == lines[0]
        for word in words:
            assert word in lines[0], lines[0]
        assert not self.commits
        return lines[0]

    def shown(self) -> list[str]:
        """Names in data/ that a user and DVC see: all but hidden ones."""
        data = self.root / "data"
        return sorted(p.name for p in data.iterdir() if not p.name.startswith(".")) if data.exists() else []


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str) -> Project:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    found = Project(tmp_path / "project")
    found.root.mkdir()
    for module in ("commands.prepare", "cli.pipelines"):
        monkeypatch.setattr(f"dp_lora.{module}.ROOT", found.root)
    for module in ("record", "prepared"):
        monkeypatch.setattr(f"dp_lora.cli.{module}.RUNS", found.root / "runs")
    monkeypatch.setattr("dp_lora.cli.prepared.WORKING", found.root / "runs/working")
    monkeypatch.setattr("dp_lora.commands.prepare.dvc", lambda *arguments: found.commits.append(arguments))
    return found


def clone(source: Path, target: Path) -> Path:
    """A git repository with the files of this working tree, for commands that write."""
    listed = subprocess.run(
        ["git", "-C", str(source), "ls-files", "-co", "--exclude-standard", "-z"], capture_output=True, check=True
    )
    target.mkdir(parents=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((source / name).read_bytes())
            (target / name).chmod((source / name).stat().st_mode)
    subprocess.run(["git", "-C", str(target), "init", "-q"], check=True)
    commit_all(target)
    return target


def commit_all(project: Path) -> None:
    """Commit all files that a test has put into its repository."""
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["add", "-A"], [*identity, "commit", "-qm", "as it is"]):
        subprocess.run(["git", "-C", str(project), *command], check=True)
