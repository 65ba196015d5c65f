"""The diffusion process as pure functions: schedules, adding noise, training targets, loss per row. Knows no network.

Latent diffusion (Rombach et al. 2022) builds on DDPM (Ho et al. 2020, section 2): x_t = sqrt(a_t) x_0 +
sqrt(1 - a_t) e with a_t = alphas_cumprod[t], t in [0, steps), e ~ N(0, 1).
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from dp_lora.errors import InputError

# latent diffusion's names -> diffusers'; its "linear" is linear in sqrt(beta)
SCHEDULES = {"linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
PREDICTION_TYPES = ("epsilon", "v_prediction")


def make_scheduler(
    beta_schedule: str,
    beta_start: float,
    beta_end: float,
    prediction_type: str,
    steps: int = 1000,
    trained_betas: list[float] | None = None,
) -> DDIMScheduler:
    """A DDIM scheduler with latent diffusion's arguments.

    `beta_schedule`: "linear" (from beta_start to beta_end, linear in sqrt(beta)) or "cosine" (Nichol & Dhariwal 2021,
    section 3.2, s = 0.008; beta_start and beta_end do not matter). `prediction_type`: "epsilon" or "v_prediction".
    `trained_betas` (steps,), the very values a model was trained with, take the place of the formula.
    Its `alphas_cumprod` (steps,) float32 is what the functions below take. Raises InputError for other names.
    """
    if beta_schedule not in SCHEDULES:
        raise InputError(f"ldm.beta_schedule={beta_schedule}: must be one of {', '.join(SCHEDULES)}")
    _check_prediction_type(prediction_type)
    return DDIMScheduler(
        num_train_timesteps=steps,
        beta_schedule=SCHEDULES[beta_schedule],
        beta_start=beta_start,
        beta_end=beta_end,
        trained_betas=trained_betas,
        prediction_type=prediction_type,
        # latent diffusion's DDIM: timesteps 1, 1 + c, ...; the last step goes to alphas_cumprod[0], not to 1
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


def _check_prediction_type(prediction_type: str) -> None:
    if prediction_type not in PREDICTION_TYPES:
        raise InputError(f"ldm.prediction_type={prediction_type}: must be one of {', '.join(PREDICTION_TYPES)}")


def _signal_and_noise_scale(alphas_cumprod: Tensor, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    a = alphas_cumprod.to(like.device)[t]
    shape = t.shape + (1,) * (like.ndim - t.ndim)
    return a.sqrt().to(like.dtype).view(shape), (1 - a).sqrt().to(like.dtype).view(shape)


def diffuse(x0: Tensor, noise: Tensor, alphas_cumprod: Tensor, t: Tensor) -> Tensor:
    """x_t of rows x0 (..., C, H, W), noise of the same shape, t (...) int64; returns the shape of x0."""
    signal, spread = _signal_and_noise_scale(alphas_cumprod, t, x0)
    return signal * x0 + spread * noise


def target(x0: Tensor, noise: Tensor, alphas_cumprod: Tensor, t: Tensor, prediction_type: str) -> Tensor:
    """The network's target at x_t: e, or v = sqrt(a_t) e - sqrt(1 - a_t) x_0 (Salimans & Ho 2022, app. D).

    Shapes as in `diffuse`.
    """
    _check_prediction_type(prediction_type)
    if prediction_type == "epsilon":
        return noise
    signal, spread = _signal_and_noise_scale(alphas_cumprod, t, x0)
    return signal * noise - spread * x0


def loss_per_row(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error of rows (..., C, H, W), averaged over C, H and W and reduced over nothing else; returns (...)."""
    return (prediction - target).square().mean(dim=(-3, -2, -1))


@dataclass(frozen=True)
class Ddpm:
    """Noise by a schedule of discrete timesteps; `alphas_cumprod` (steps,) float32."""

    alphas_cumprod: Tensor
    prediction_type: str
    times = np.int64

    def time(self, stream: np.random.Generator, low: int, high: int) -> int:
        """A timestep, uniform in [low, high)."""
        return int(stream.integers(low, high))

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and the network's target at it, rows (R, C, H, W); t (R,) int64."""
        x_t = diffuse(x0, noise, self.alphas_cumprod, t)
        return x_t, target(x0, noise, self.alphas_cumprod, t, self.prediction_type)

    def to(self, device: torch.device) -> "Ddpm":
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))


@dataclass(frozen=True)
class Flow:
    """Flow matching (Lipman et al. 2023) as rectified flow: x_s = (1 - s) x_0 + s e, the target e - x_0.

    s = shift u / (1 + (shift - 1) u) with u = 1 / (1 + exp(-N(0, 1))) (Esser et al. 2024, sections 3.1 and 5.3.2).
    """

    shift: float
    times = np.float32

    def time(self, stream: np.random.Generator, low: int, high: int) -> float:
        """A time s in (low / 1000, high / 1000): drawn anew until it lies there."""
        while True:
            u = 1 / (1 + np.exp(-stream.standard_normal()))
            s = float(self.shift * u / (1 + (self.shift - 1) * u))
            if low / 1000 < s < high / 1000:
                return s

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """As `Ddpm.noised`; t (R,) float32, times s."""
        s = t.view(-1, *(1,) * (x0.ndim - 1)).to(x0.dtype)
        return (1 - s) * x0 + s * noise, noise - x0

    def to(self, device: torch.device) -> "Flow":
        return self


Process = Ddpm | Flow


def process_of(scheduler: Any, where: str) -> Process:
    """How a base with this scheduler of diffusers was trained. InputError, which begins with `where`, for another."""
    name, config = type(scheduler).__name__, scheduler.config
    prediction_type = config.get("prediction_type", "epsilon")
    # "flow_prediction" stands in a solver of other processes too, as published bases of Sana have it
    if name.startswith("FlowMatch") or prediction_type == "flow_prediction":
        # a shift that follows the picture's size is the pipeline's when it draws; in training it is none
        shift = config.get("shift") or config.get("flow_shift") or 1.0
        return Flow(1.0 if config.get("use_dynamic_shifting") else float(shift))
    if name.startswith("EDM"):  # its config says epsilon all the same
        prediction_type = "EDM's target"
    if prediction_type not in PREDICTION_TYPES:
        raise InputError(
            f"{where}: its {name} predicts {prediction_type}; bases that predict {' or '.join(PREDICTION_TYPES)}, or "
            "flow matching, can be fine-tuned"
        )
    if isinstance(scheduler, DDIMScheduler):
        return Ddpm(scheduler.alphas_cumprod, prediction_type)
    return Ddpm(DDPMScheduler.from_config(config).alphas_cumprod, prediction_type)
