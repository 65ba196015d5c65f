"""A tiny private fine-tuning on compute.devices ranks, as the entry point makes it; for test_ranks.py.

ranks_target HOUSE RUN OVERRIDES [MODE]: every number of ranks has one binding, so the runs share coins and noise.
MODE kill-first-N and kill-other-N kill that rank in step N; hang-first-N and hang-other-N stop it there for good, but
alive. end-at-start: the other ranks end before they join. encode: only encode HOUSE/data, into HOUSE/RUN. audit: train
with canaries among the pictures, and write the findings to HOUSE/RUN.json.
"""

import os
import signal
import sys
from pathlib import Path

import torch

from dp_lora import launch
from dp_lora.cli.common import one_line_errors
from dp_lora.data.latents import encode_dataset
from dp_lora.data.layout import read_dataset
from dp_lora.events import Events
from dp_lora.files import write_json
from dp_lora.models.folder import load_model
from dp_lora.models.info import model_digest
from dp_lora.privacy import sums as sums_module
from dp_lora.training.audit import assist_with, audit_with
from dp_lora.training.finetune import PrivateData, assist, finetune, units_of
from dp_lora.training.run_folder import binding, open_run_folder
from tests.support.tiny import tiny_config, tiny_latents

N = 30
CPU = torch.device("cpu")


def main(house: Path, name: str, overrides: str, mode: str = "") -> None:
    config = tiny_config(overrides)
    torch.use_deterministic_algorithms(True)
    if mode == "end-at-start" or mode.startswith("hang"):
        launch.GRACE = 5.0
    if mode == "end-at-start" and launch.STARTED in os.environ:
        sys.exit(3)
    fabric = launch.make_fabric(config.compute, CPU)
    latents, labels = tiny_latents(N)
    data = PrivateData(latents, labels, units_of(N, None, "picture"))
    with launch.joined(fabric, config.compute, CPU) as (team, device):
        model = load_model(house / "base")
        if mode == "encode":
            dataset = read_dataset(house / "data", ["x", "y"], "train")
            encode_dataset(dataset, model.vae, house / name, device, 5, Events(), team)
            return
        if not team.first:
            if mode.startswith(("kill-other", "hang-other")):
                _die_before_sum(mode)
            (assist_with if mode == "audit" else assist)(config, model, data, device, team)
            return
        if mode.startswith(("kill-first", "hang-first")):
            _die_before_sum(mode)
        bound = binding(
            tiny_config(overrides.partition(" compute.devices")[0]), "data", model_digest(house / "base"), "cpu"
        )
        names = {"path": "base", "digest": bound["base"]}
        if mode == "audit":
            found = audit_with(config, model, names, data, bound, house / name, device, team)
            write_json(house / f"{name}.json", found.audit.as_json())
            return
        with open_run_folder(house / name, config, bound) as run:
            finetune(config, model, names, data, run, device, Events(), lambda *_: None, team)


def _die_before_sum(mode: str) -> None:
    """Send this process SIGKILL or SIGSTOP while it works on step N of `mode`, counted from 0."""
    step = int(mode.rpartition("-")[2])
    sent = signal.SIGKILL if mode.startswith("kill") else signal.SIGSTOP
    real, calls = sums_module.sum_over_units, []

    def dying(*arguments):
        if len(calls) == step:
            os.kill(os.getpid(), sent)
        calls.append(step)
        return real(*arguments)

    sums_module.sum_over_units = dying


if __name__ == "__main__":
    with one_line_errors():
        main(Path(sys.argv[1]), *sys.argv[2:])
