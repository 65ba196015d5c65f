"""A tiny text-to-image fine-tuning on one and on two gloo ranks: text_ranks OUT BASE OVERRIDES fills OUT/on-1, on-2."""

import sys
from pathlib import Path

import torch

from tests.support.gloo_steps import ranks
from tests.support.text2image import fine_tuned

if __name__ == "__main__":
    out, base, overrides = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    for size in (1, 2):
        ranks(size, out, lambda team, folder: str(fine_tuned(folder, base, overrides, f"on-{team.size}", team)))
