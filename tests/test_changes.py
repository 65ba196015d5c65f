"""A command that changes files in git names them once, with the command that puts them back."""

import subprocess
from dataclasses import replace

import pytest

from dp_lora.cli import changes
from dp_lora.cli.pipelines import PIPELINES


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A repository with the parameters and the lock of one pipeline."""

    def git(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a", *arguments], cwd=tmp_path, check=True)

    for name in ("params.yaml", "dvc.lock", "data.dvc"):
        (tmp_path / name).write_text("first\n")
    git("init", "-q")
    git("add", "params.yaml", "dvc.lock")
    git("commit", "-qm", "first")
    monkeypatch.setattr(changes, "ROOT", tmp_path)
    monkeypatch.setattr(changes, "relative", lambda path: path.name)
    here = replace(PIPELINES["letters"], file=str(tmp_path / "dvc.yaml"))
    monkeypatch.setattr(changes, "PIPELINES", {"letters": here})
    return tmp_path


def test_what_a_command_changes_in_files_of_git_s_is_said_with_what_puts_it_back(project, capsys):
    def told(**texts: str) -> str:
        with changes.telling_changes():
            for name, text in texts.items():
                (project / name.replace("_", ".")).write_text(text)
        return capsys.readouterr().err

    assert told() == told(params_yaml="first\n") == ""
    # it is not in git, and DVC advises to add it
    assert told(data_dvc="second\n") == "do not publish data.dvc where data are private: their hashes are inside\n"
    both = told(params_yaml="second\n", dvc_lock="second\n")
    names = "dvc.lock params.yaml"
    assert both == (
        f"changed by this command: {names.replace(' ', ' and ')}; `git checkout {names}` puts back what was committed\n"
        "do not publish dvc.lock where data are private: their hashes are inside\n"
    )
    assert told(dvc_lock="second\n") == ""  # it was changed before this command
    assert told(params_yaml="first\n") == ""  # it is again as committed
    subprocess.run(["git", "checkout", "-q", *names.split()], cwd=project, check=True)
    assert (project / "dvc.lock").read_text() == "first\n"
    assert "private" not in told(params_yaml="second\n")


def test_it_is_said_where_the_command_fails_too(project, capsys):
    @changes.telling_changes()
    def stopped() -> None:
        (project / "dvc.lock").write_text("second\n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert "`git checkout dvc.lock`" in capsys.readouterr().err
