"""One rank of a tiny private fine-tuning whose ranks share one device; for test_gpu.py.

gpu_rank_target HOUSE RUN OVERRIDES DEVICE RANK SIZE: the ranks meet over a file in HOUSE. `compute.devices` is not set,
so every number of ranks has one binding, and the runs share coins and noise.
"""

import sys
from pathlib import Path

import torch
from torch import distributed

from dp_lora.events import Events
from dp_lora.models.folder import load_model
from dp_lora.models.info import model_digest
from dp_lora.team import Team
from dp_lora.training.finetune import PrivateData, assist, finetune, units_of
from dp_lora.training.run_folder import binding, open_run_folder
from tests.support.tiny import tiny_config, tiny_latents

N = 30


def main(house: Path, name: str, overrides: str, device: torch.device, team: Team) -> None:
    config = tiny_config(overrides)
    latents, labels = tiny_latents(N)
    data = PrivateData(latents, labels, units_of(N, None, "picture"))
    model = load_model(house / "base", device)
    if not team.first:
        assist(config, model, data, device, team)
        return
    bound = binding(config, "data", model_digest(house / "base"), device.type)
    names = {"path": "base", "digest": bound["base"]}
    with open_run_folder(house / name, config, bound) as run:
        finetune(config, model, names, data, run, device, Events(), lambda *_: None, team)


if __name__ == "__main__":
    house, rank, size = Path(sys.argv[1]), int(sys.argv[5]), int(sys.argv[6])
    if size > 1:
        meeting = f"file://{house}/meeting-{sys.argv[2]}"
        distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    main(house, sys.argv[2], sys.argv[3], torch.device(sys.argv[4]), Team(rank, size))
    if size > 1:
        distributed.destroy_process_group()
