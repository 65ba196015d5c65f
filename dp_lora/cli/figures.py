"""What DVC shows of the paper's pipelines: a pipeline gets its metrics and plots when an experiment of it is scored.

`dvc metrics show`, `dvc plots` and `dvc exp show` read every dvc.yaml of the project. A file that one names and nobody
has made is an empty row and a warning, also for somebody who works on the default experiment alone.
"""

from collections.abc import Mapping
from typing import Any

import yaml

from dp_lora.cli.pipelines import outputs, pipeline_of
from dp_lora.config import ROOT, Config
from dp_lora.files import whole_file

HEAD = "# What `dvc metrics`, `dvc plots` and `dvc exp show` show of this pipeline; its stage `fid` wrote it.\n"


def show_figures(config: Config) -> None:
    """Write the `figures` of a scored experiment's pipeline: the metrics and plots of dvc.yaml, in its own folders.

    They follow the params.yaml of the pipeline. The default pipeline has its own in dvc.yaml; nothing is written there.
    """
    figures = pipeline_of(config).figures
    if figures is None or not (outputs(config) / "evaluation" / "metrics.json").exists():
        return
    default = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    # an experiment without classes has no accuracy per class
    plots = [plot for plot in default["plots"] if (outputs(config) / _file(plot)).exists()]
    shown = {"vars": ["../params.yaml"], "metrics": default["metrics"], "plots": plots}
    # DVC counts paths from the file that names them
    above = f"../../../{outputs(config).parent.relative_to(ROOT).as_posix()}/"
    text = HEAD + yaml.safe_dump(shown, sort_keys=False).replace("outputs/", above)
    path = ROOT / figures
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(exist_ok=True)
        with whole_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _file(plot: str | Mapping[str, Any]) -> str:
    """The file of a plot of dvc.yaml, counted from the folder of an experiment."""
    named = plot if isinstance(plot, str) else next(iter(next(iter(plot.values()))["y"]))
    return named.removeprefix("outputs/${config}/")
