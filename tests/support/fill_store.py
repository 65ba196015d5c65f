"""Train, draw and score at three epsilons through the entry points, in one process; run this in a tiny project.

Base and datasets are made without tracking: the tests ask MLflow only for the fine-tunings and the stages after them.
"""

import json
import sys

from dp_lora.cli.pipelines import base_folder, private_data, public_data
from dp_lora.commands import fid, finetune, sample
from dp_lora.config import ROOT, load
from dp_lora.data.prepare import prepare_private, prepare_public
from dp_lora.events import Events
from tests.support.tiny import make_base
from tests.support.tiny_project import EPSILONS, EXPERIMENT


def newest_run(stage: str) -> str:
    """The run id of the newest run of a stage."""
    from dp_lora.tracking.store import connect, experiment_id

    client = connect()
    order = ["attributes.start_time DESC"]
    return client.search_runs([experiment_id(client)], f"tags.stage = '{stage}'", order_by=order)[0].info.run_id


def main() -> None:
    config = load(EXPERIMENT)
    prepare_public(config, public_data(config), Events())
    prepare_private(config, private_data(config), Events())
    make_base(base_folder(config), config)
    runs: dict[str, dict[str, str]] = {}
    for eps in EPSILONS:
        runs[eps] = {}
        for stage, inputs in ((finetune, None), (sample, "adapter"), (fid, "samples")):
            before = {"adapter": "finetune", "samples": "sample"}.get(inputs or "", "")
            given = ["--config", EXPERIMENT, "--overrides", f"privacy.eps={eps}"]
            given += [f"--{inputs}", runs[eps][before]] if inputs else []
            stage.main.main(given, standalone_mode=False)
            name = stage.__name__.removeprefix("dp_lora.commands.")
            runs[eps][name] = newest_run(name)
    (ROOT / "filled.json").write_text(json.dumps(runs), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
