"""`dp-lora COMMAND`, or `python -m dp_lora COMMAND`: every command of the project."""

import importlib
import sys
from pathlib import Path

import click

from dp_lora import __version__
from dp_lora.cli.common import OneLineGroup
from dp_lora.config import ROOT, STAGES
from dp_lora.config.paths import in_another_clone

OTHERS = ("reproduce", "ui", "upload")
OF_DVC = ("resolve",)  # called by dvc.yaml alone


class Commands(OneLineGroup):
    """The commands by name; each is imported when it is called, as one does not need what another does."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*STAGES, *OTHERS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in (*STAGES, *OTHERS, *OF_DVC):
            return None
        return importlib.import_module(f"dp_lora.commands.{cmd_name}").main


@click.group(cls=Commands, context_settings={"max_content_width": 120})
@click.version_option(__version__, message="%(version)s")
def main() -> None:
    """Differentially private LoRA fine-tuning of latent diffusion models."""
    if in_another_clone(here := Path.cwd()):
        click.echo(
            f"error: {here}: another clone than this command's, {ROOT}; use the command of its own .venv", err=True
        )
        sys.exit(1)


if __name__ == "__main__":
    main(prog_name="dp-lora")
