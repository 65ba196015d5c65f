"""How well a base of letters predicts noise: its loss on letters that it never saw, by which bases are compared.

What private fine-tuning cannot learn under noise, the base must bring: `docs/hyperparameters.md` has the table.
"""

from pathlib import Path
from string import ascii_uppercase
from tempfile import TemporaryDirectory

import click
import numpy as np
import torch

from dp_lora.config import load
from dp_lora.data.layout import read_dataset
from dp_lora.data.prepare import prepare_public
from dp_lora.evaluation.membership import losses
from dp_lora.events import Events
from dp_lora.models.folder import load_model

PICTURES = 1000
SEED = 1  # the shipped base learns letters of seed 0


@click.command()
@click.argument("bases", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(bases: tuple[Path, ...]) -> None:
    """Print the mean loss of each of BASES on fresh letters, at the timesteps of private fine-tuning."""
    # the letters that every base knows, whichever other scripts it learnt
    config = load("mnist5k", {"seed": str(SEED)}, f"public.n={PICTURES} public.classes=[{','.join(ascii_uppercase)}]")
    with TemporaryDirectory() as folder:
        prepare_public(config, Path(folder) / "letters", Events())
        letters = read_dataset(Path(folder) / "letters", config.public.classes, "train")
        for base in bases:
            found = losses(load_model(base, torch.device("cpu")), config, letters, np.arange(PICTURES), None)
            click.echo(f"{base}: mean loss {found.mean():.4f} over {PICTURES} letters")


if __name__ == "__main__":
    main()
