"""Who takes part in a step."""

import numpy as np


def poisson_draw(n_units: int, sample_rate: float, generator: np.random.Generator) -> np.ndarray:
    """Positions (int64, ascending) of the units of one step; may be empty.

    Guarantee: each of the `n_units` units is in with probability `sample_rate` (to within 2^-53), independently of all
    others and of all other steps: the subsampling that the accountant assumes.
    """
    return np.flatnonzero(generator.random(n_units) < sample_rate)
