"""Samples of the base before fine-tuning: what they score was there before any private picture was seen."""

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dp_lora.config.schema import Config
from dp_lora.evaluation.cache import Cache
from dp_lora.models.folder import Model
from dp_lora.sampling import balanced, draw_in_batches, model_fingerprint

MOST = 250  # they score far from all others, and more of them cost a minute

Labelled = tuple[NDArray[np.uint8], NDArray[np.int64]]  # pictures (n, H, W, C), and their labels (n,)


def samples_of_base(config: Config, model: Model, names: list[str], n: int, cache: Cache) -> Labelled:
    """`n` samples of `model`, at most MOST, drawn as those of the fine-tuned model are; kept in `cache`.

    The samples are of `names` in turn, and a label is a place in `names`: classes of `model`, or prompts of a
    text-to-image base.
    """
    sampling, seed = config.sampling, config.experiment.seed
    rows = balanced(names, min(n, MOST))
    in_model = [model.classes.index(name) for name, _ in rows]
    facts: dict[str, Any] = {"model": model_fingerprint(model), "names": names, "n": len(rows), "seed": seed}
    facts["sampling"] = asdict(sampling)

    def make() -> NDArray[np.uint8]:
        return draw_in_batches(model, in_model, [i for _, i in rows], sampling, seed, model.device)

    return cache.array("base-samples", facts, make), np.array([names.index(name) for name, _ in rows], np.int64)
