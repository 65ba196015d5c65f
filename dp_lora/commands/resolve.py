"""First stage of a pipeline: params.yaml and configs/ become one resolved YAML; the stages depend on its sections.

It runs at every `dvc repro`, so that prepared pictures withdrawn from data.path are removed before any stage.
"""

import click

from dp_lora.cli.closed_folders import close_folders
from dp_lora.cli.common import OneLineCommand, one_line_errors, relative
from dp_lora.cli.figures import show_figures
from dp_lora.cli.pipeline import read_params
from dp_lora.cli.pipelines import PIPELINES, from_outside, pipeline_of, what_to_type
from dp_lora.cli.prepared import look
from dp_lora.config import ROOT, load, write_resolved
from dp_lora.errors import InputError


@click.command(cls=OneLineCommand)
@click.option("--pipeline", "name", type=click.Choice(list(PIPELINES)), default="letters", show_default=True)
def main(name: str) -> None:
    """Write the resolved config of a pipeline's params.yaml, and say which folders from outside are missing."""
    with one_line_errors(child=True):
        pipeline = PIPELINES[name]
        values = read_params(pipeline)
        config = load(values.pop("config"), values, values.pop("overrides", ""))
        if pipeline_of(config) != pipeline:
            raise InputError(
                f"{relative(pipeline.params)}: config={config.experiment.name} belongs to {pipeline_of(config).file}; "
                f"run that one, or `main`, which picks it"
            )
        write_resolved(config, ROOT / pipeline.resolved)
        look(config)
        close_folders(config)  # each `dvc repro` passes here
        # not an error: a single stage may need fewer folders
        line = what_to_type(config, from_outside(config))
        if line is not None:
            click.echo(line, err=True)
        show_figures(config)  # when DVC takes `fid` from its run cache, `fid` does not do this
