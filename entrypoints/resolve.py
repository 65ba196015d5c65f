"""First stage of the pipeline: params.yaml and configs/ become one resolved YAML; the stages depend on its sections."""

import click

from dp_lora.config import ROOT, load, write_resolved
from entrypoints.common import DEFAULT_CONFIG, one_line_errors
from entrypoints.pipeline import read_params

RESOLVED = ROOT / "outputs" / "resolved.yaml"


@click.command()
def main() -> None:
    """Write outputs/resolved.yaml."""
    with one_line_errors(child=True):
        values = read_params()
        name = values.pop("config", DEFAULT_CONFIG)
        overrides = values.pop("overrides", "")
        write_resolved(load(name, values, overrides), RESOLVED)


if __name__ == "__main__":
    main()
