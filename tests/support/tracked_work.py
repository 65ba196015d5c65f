"""A run in a process of its own: it prints its run id and waits for a line; meanwhile a test may end its server."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from dp_lora import tracking
from dp_lora.config import load
from dp_lora.tracking.tracked_run import TrackedRun


def tell(run: TrackedRun, part: str, folder: Path) -> None:
    """Send every kind of record that a run knows, with `part` in its name."""
    folder.mkdir()
    picture = folder / "grid.png"
    Image.fromarray(np.full((8, 8), len(part), np.uint8)).save(picture)
    (folder / "release" / "peft").mkdir(parents=True)
    (folder / "release" / "peft" / f"{part}.json").write_text(part)
    for step in range(3):
        run.metric(f"{part}/loss", step / 2, step)
    run.metric(f"{part}/epsilon", float("inf"))
    run.params({f"{part}.noise": 1.5})
    run.tags({"part": part, f"only_{part}": True})
    run.image(f"{part}/step-5", picture)
    run.artifact(folder / "release")
    run.artifact(picture, part)
    run.json({"part": part}, f"facts_{part}")
    run.table({"class": ["0", "1"], "accuracy": [0.5, 0.75]}, f"table_{part}")
    run.dataset(part, folder / "release", "ab" * 32)
    run.made_from("base", output="nowhere")
    run.message(f"told {part}")


if __name__ == "__main__":
    place, many = Path(sys.argv[1]), int(sys.argv[2])
    with tracking.run("finetune", load("mnist5k")) as run:
        tell(run, "before", place / "before")
        run._metrics.flush()
        print(run.run_id, flush=True)
        sys.stdin.readline()
        tell(run, "after", place / "after")
        for number in range(many):
            run.tags({f"tag_{number}": number})
