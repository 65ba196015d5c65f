"""Declare metrics and plots of the paper's pipelines to DVC, each when one of its experiments is scored.

`dvc metrics show`, `dvc plots` and `dvc exp show` read every dvc.yaml of the project. A declared file that
nobody has made gives an empty row and a warning, even to a user of the default experiment alone.
"""

from collections.abc import Mapping
from typing import Any

import yaml

from dp_lora.cli.pipelines import outputs, pipeline_of
from dp_lora.config import ROOT, Config
from dp_lora.files import whole_file

HEAD = "# What `dvc metrics`, `dvc plots` and `dvc exp show` show of this pipeline; its stage `fid` wrote it.\n"


def show_figures(config: Config) -> None:
    """Write the `figures` file of a scored experiment's pipeline: dvc.yaml's metrics and plots, in its own folders.

    They follow the pipeline's params.yaml. The default pipeline has them in dvc.yaml: nothing is written for it.
    """
    figures = pipeline_of(config).figures
    if figures is None or not (outputs(config) / "evaluation" / "metrics.json").exists():
        return
    default = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    # an experiment without classes has no accuracy per class
    plots = [plot for plot in default["plots"] if (outputs(config) / _file(plot)).exists()]
    shown = {"vars": ["../params.yaml"], "metrics": default["metrics"], "plots": plots}
    # DVC reads paths relative to the file that names them
    above = f"../../../{outputs(config).parent.relative_to(ROOT).as_posix()}/"
    text = HEAD + yaml.safe_dump(shown, sort_keys=False).replace("outputs/", above)
    path = ROOT / figures
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(exist_ok=True)
        with whole_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _file(plot: str | Mapping[str, Any]) -> str:
    """The file of a plot in dvc.yaml, relative to an experiment's folder."""
    named = plot if isinstance(plot, str) else next(iter(next(iter(plot.values()))["y"]))
    return named.removeprefix("outputs/${config}/")
