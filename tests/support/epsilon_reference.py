"""Bounds on epsilon that share neither code nor method with the printed one, and plans to compare them on."""

import json
import math
import resource
import sys
import time
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp, ndtr, ndtri
from scipy.stats import norm

from dp_lora.privacy.plan import LARGEST_BATCH

# (eps, delta, n_public, batch_size, epochs): calibrating these once took a minute, two minutes, or never ended
SLOW_ONCE = (
    (96.5687, 2.71e-7, 482, 4, 416.144),
    (59.9508, 2.63e-6, 88, 1, 273.334),
    (60.6068, 7.62e-10, 88589, 53843, 11080.2),
    (100.0, 1e-6, 100_000, 20_000, 0.2),
    (24.3101, 3.28e-7, 48481, 19, 27.4118),
    (100.0, 1e-6, 100_000, 100, 0.001),
    (100.0, 1e-6, 100_000, 100_000, 1.0),
)
EXTREME = (
    (0.01, 1e-10, 1000, 1000, 1e6),  # 10^6 steps at rate 1
    (0.01, 9e-7, 1_000_000, 1, 1e-6),  # one step, delta nearly the rate
    (0.05, 1e-5, 1000, 1, 100.0),  # once got eight times the noise that it needs
    (100.0, 1e-10, 1_000_000, 1, 1.0),  # 10^6 steps in which a unit is drawn once
    (0.1404, 1e-5, 1000, 14, 887.628),
    (0.01, 1e-5, 2, 1, 5e5),  # rate 1/2, at which Opacus' RDP is slowest
)


def plans(count: int) -> list[tuple[float, float, int, int, float]]:
    """`count` plans: eps 0.01 to 100, q 1e-6 to 1, 1 to 10^6 steps, delta 1e-10 to 1e-2; the listed ones come first."""
    found = [*SLOW_ONCE, *EXTREME]
    draws = np.random.default_rng(0)
    while len(found) < count:
        eps, delta, steps = (10 ** draws.uniform(*ends) for ends in ((-2, 2), (-10, -2), (0, 6)))
        n_public = int(min(0.99 / delta, 10**6))
        batch_size = min(round(n_public * 10 ** draws.uniform(max(-6, -math.log10(n_public)), 0)), LARGEST_BATCH)
        found.append((float(eps), float(delta), n_public, batch_size, round(steps) * batch_size / n_public))
    return found[:count]


def calibrate_first(count: int) -> list[dict[str, Any]]:
    """Calibrate the first `count` plans; seconds are CPU time of this process."""
    from dp_lora.privacy.accounting import calibrate, pld_epsilon

    found = []
    for eps, delta, n_public, batch_size, epochs in plans(count):
        began = time.process_time()
        plan = calibrate(
            eps=eps, delta=delta, n_public=n_public, batch_size=batch_size, epochs=epochs, max_grad_norm=1.0, k=1,
            unit="picture",
        )  # fmt: skip
        seconds = time.process_time() - began
        public = (plan.sample_rate, plan.noise_multiplier / plan.sensitivity, plan.steps, plan.delta)
        found.append({"eps": eps, "public": public, "epsilon": pld_epsilon(*public), "seconds": seconds})
    return found


def gaussian_epsilon(shift: float, delta: float) -> float:
    """Exact epsilon of one Gaussian mechanism; a unit moves it by `shift` standard deviations (Balle and Wang 2018)."""

    def excess(eps: float) -> float:
        return norm.cdf(shift / 2 - eps / shift) - np.exp(eps + norm.logcdf(-shift / 2 - eps / shift)) - delta

    return float(brentq(excess, 0, 1e5, xtol=1e-12)) if excess(0) > 0 else 0.0


def one_step_epsilon(q: float, sigma: float, delta: float) -> float:
    """Exact epsilon of one subsampled Gaussian step, for a removed unit: removing costs more than adding."""

    def excess(eps: float) -> float:
        x = 0.5 + sigma**2 * math.log1p(math.expm1(eps) / q)
        return q * norm.sf((x - 1) / sigma) - (math.expm1(eps) + q) * norm.sf(x / sigma) - delta

    return float(brentq(excess, 0, 10, xtol=1e-15)) if excess(0) > 0 else 0.0


def optimistic_pld(q: float, sigma: float, steps: int, delta: float, interval: float) -> float:
    """dp-accounting's lower bound on epsilon: it rounds losses down, which costs about steps * interval / 2."""
    return dp_accounting_pld(q, sigma, steps, delta, interval, pessimistic=False)


def dp_accounting_pld(
    q: float, sigma: float, steps: int, delta: float, interval: float, *, pessimistic: bool = True
) -> float:
    from dp_accounting.pld import privacy_loss_distribution

    pld = privacy_loss_distribution.from_gaussian_mechanism(
        sigma,
        sampling_prob=q,
        pessimistic_estimate=pessimistic,
        value_discretization_interval=interval,
        log_mass_truncation_bound=max(-50.0, math.log(1e-4 * delta / steps)),
        use_connect_dots=pessimistic,
    )
    return float(pld.self_compose(steps).get_epsilon_for_delta(delta))


def sampled_delta(
    q: float, sigma: float, steps: int, eps: float, delta: float, *, removed: bool, samples: int = 2000
) -> tuple[float, float]:
    """Delta at `eps` from below: mean and standard error of an importance sample.

    It reads the outcome in cells alone, which is post-processing. It draws steps from the distribution tilted by
    exp(loss), so that their sum is about eps, and adds up each step's exact loss per cell. No grid of losses, no FFT.
    """
    cut = 1e-4 * delta / steps
    reach, drawn = -float(ndtri(cut)), -float(ndtri(min(cut / q, 0.5)))
    edges = np.linspace(-reach * sigma, max(reach * sigma, 1 + drawn * sigma) if removed else reach * sigma, 601)

    def between(z):
        return np.where(z[:-1] > 0, ndtr(-z[:-1]) - ndtr(-z[1:]), ndtr(z[1:]) - ndtr(z[:-1]))

    noise = between(edges / sigma)
    mixture = (1 - q) * noise + q * between((edges - 1) / sigma)
    upper, lower = (mixture, noise) if removed else (noise, mixture)
    some = (upper > 1e-280) & (lower > 1e-280)
    upper, loss = upper[some], np.log(upper[some] / lower[some])
    tilts = np.geomspace(1e-3, 1e7, 240)
    log_mgf = logsumexp(tilts[:, None] * loss, b=upper, axis=1)
    best = int(np.argmin(steps * log_mgf - tilts * eps))
    chances = np.exp(np.log(upper) + tilts[best] * loss - log_mgf[best])
    draws = np.random.default_rng(1)
    total = draws.multinomial(steps, chances / chances.sum(), size=samples) @ loss
    weights = np.exp(np.minimum(steps * log_mgf[best] - tilts[best] * total, 700)) * -np.expm1(
        np.minimum(eps - total, 0)
    )
    return float(weights.mean()), float(weights.std() / math.sqrt(samples))


if __name__ == "__main__":
    print(json.dumps([calibrate_first(int(sys.argv[1])), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
