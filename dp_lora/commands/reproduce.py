"""Make a run again from its record, in a separate work tree, and compare file by file."""

import shutil
import sys
from pathlib import Path

import click

from dp_lora.cli.common import OneLineCommand, one_line_errors, relative
from dp_lora.cli.pipelines import RUNS
from dp_lora.cli.record import signature, upstream
from dp_lora.cli.remaking import Recorded, git, make_again, read_recorded, result_folder
from dp_lora.config import ROOT, STAGES, require_clone
from dp_lora.errors import InputError
from dp_lora.reproduction import ComparedFile, compare
from dp_lora.tracking.process import stop_signals_raise


@click.command(cls=OneLineCommand)
@click.argument("run_id")
def main(run_id: str) -> None:
    """Make the MLflow run RUN_ID again and say of each file whether it came out equal.

    Of a private run with fresh noise only the stages before the noise are made again and compared: another fine-tuning
    would spend privacy once more.
    """
    with one_line_errors(), stop_signals_raise():
        require_clone("reproduce")
        place = RUNS / "reproduce" / run_id
        tree = place / "tree"
        recorded = read_recorded(run_id, place)
        if tree.exists():
            raise InputError(f"{relative(tree)}: is there already; remove it by `git worktree remove --force` first")
        git("worktree", "add", "--detach", str(tree), recorded.commit)
        try:
            make_again(recorded, tree)
        except KeyboardInterrupt as error:
            shown = relative(tree)
            error.add_note(f"remove {shown} by `git worktree remove --force {shown}`, then type the same command again")
            raise
        equal = _report(recorded, tree)
        if equal:
            git("worktree", "remove", "--force", str(tree))
            shutil.rmtree(place)
        else:
            click.echo(f"the second making is kept in {relative(tree)}")
    sys.exit(0 if equal else 1)


def _report(recorded: Recorded, tree: Path) -> bool:
    config, sign = recorded.config, signature(recorded.run_id)
    equal = True
    for stage, folder in upstream(recorded.stage, config).items():
        if stage in recorded.files:
            if recorded.fresh_noise and stage in STAGES and STAGES[stage].noisy:
                click.echo(f"{stage}: fresh noise")
                continue
            equal &= _show(stage, compare(recorded.files[stage], folder, tree / folder.relative_to(ROOT), sign))
    if recorded.fresh_noise:
        click.echo(f"{recorded.stage}: fresh noise: not made again, it would spend privacy once more")
    else:
        again = tree / result_folder(recorded).relative_to(ROOT)
        equal &= _show(recorded.stage, compare(recorded.files["result"], recorded.output, again, sign))
    click.echo(f"{recorded.run_id}: {'equal' if equal else 'DIFFERENT'}")
    return equal


def _show(stage: str, found: list[ComparedFile]) -> bool:
    for comparison in found:
        click.echo(f"{stage}: {comparison.file}: {comparison.words}")
    return all(comparison.equal for comparison in found)
