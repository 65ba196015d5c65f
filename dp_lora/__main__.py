"""`dp-lora COMMAND`, or `python -m dp_lora COMMAND`: every command of the project."""

import importlib

import click

from dp_lora import __version__
from dp_lora.cli.common import OneLineGroup, one_line_errors
from dp_lora.config import STAGES
from dp_lora.config.paths import require_own_clone

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
    with one_line_errors():
        require_own_clone()


if __name__ == "__main__":
    main(prog_name="dp-lora")
