"""What DVC shows of the paper's pipelines: a pipeline gets its metrics and plots when an experiment of it is scored.

`dvc metrics show`, `dvc plots` and `dvc exp show` read every dvc.yaml of the project. A file that one names and nobody
has made is an empty row and a warning, also for somebody who works on the default experiment alone.
"""

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
    shown = {"vars": ["../params.yaml"], "metrics": default["metrics"], "plots": default["plots"]}
    # DVC counts paths from the file that names them
    text = HEAD + yaml.safe_dump(shown, sort_keys=False).replace("outputs/", "../../../outputs/")
    path = ROOT / figures
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(exist_ok=True)
        with whole_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
