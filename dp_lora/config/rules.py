"""What a value may be. Each error names the key as it was typed, the value, the rule and the way out."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dp_lora.errors import InputError

Rule = tuple[Callable[[Any], bool], str]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


POSITIVE: Rule = (lambda v: _number(v) and v > 0, "must be above 0")
NOT_NEGATIVE: Rule = (lambda v: _number(v) and v >= 0, "must be 0 or above")
AT_LEAST_1: Rule = (lambda v: v >= 1, "must be a whole number of at least 1")
SHARE: Rule = (lambda v: _number(v) and 0 <= v < 1, "must be in [0, 1)")
BETAS: Rule = (lambda v: len(v) == 2 and all(0 <= b < 1 for b in v), "must be two numbers in [0, 1)")
WIDTHS: Rule = (lambda v: len(v) >= 1 and all(w >= 1 for w in v), "must list at least one width of at least 1")


def _one_of(*names: str) -> Rule:
    return (lambda v: v in names, f"must be one of {', '.join(names)}")


def _distinct(value: list[str]) -> bool:
    return len(value) >= 1 and len(set(value)) == len(value) and all(value)


CLASSES: Rule = (_distinct, "must list every class once")

RULES: dict[str, Rule] = {
    "experiment.seed": (lambda v: 0 <= v < 2**63, "must be a whole number in [0, 2^63)"),
    "public.source": _one_of("letters"),
    "public.n": AT_LEAST_1,
    "public.classes": CLASSES,
    "public.size": (lambda v: v in (8, 16, 32, 64, 128, 256, 512), "must be a power of two from 8 to 512"),
    "public.channels": (lambda v: v in (1, 3), "must be 1 or 3"),
    "data.source": _one_of("mnist5k", "digits", "folder"),
    "data.classes": CLASSES,
    "data.n_public": AT_LEAST_1,
    "data.size": (lambda v: v in (8, 16, 32, 64, 128, 256, 512), "must be a power of two from 8 to 512"),
    "data.channels": (lambda v: v in (1, 3), "must be 1 or 3"),
    "autoencoder.kind": _one_of("kl", "vq"),
    "autoencoder.block_out_channels": WIDTHS,
    "autoencoder.layers_per_block": AT_LEAST_1,
    "autoencoder.latent_channels": AT_LEAST_1,
    "autoencoder.norm_num_groups": AT_LEAST_1,
    "autoencoder.mse_weight": NOT_NEGATIVE,
    "autoencoder.l1_weight": NOT_NEGATIVE,
    "autoencoder.lpips_weight": NOT_NEGATIVE,
    "autoencoder.kl_weight": NOT_NEGATIVE,
    "autoencoder.disc_start": (lambda v: v is None or v >= 0, "must be null, or a step of at least 0"),
    "autoencoder.disc_weight": NOT_NEGATIVE,
    "autoencoder.batch_size": AT_LEAST_1,
    "autoencoder.epochs": POSITIVE,
    "autoencoder.lr": POSITIVE,
    "autoencoder.lr_schedule": _one_of("constant", "cosine"),
    "ldm.block_out_channels": WIDTHS,
    "ldm.layers_per_block": AT_LEAST_1,
    "ldm.attention_head_width": AT_LEAST_1,
    "ldm.attention_heads": (lambda v: v is None or v >= 1, "must be null, or a whole number of at least 1"),
    "ldm.cross_attention_dim": AT_LEAST_1,
    "ldm.norm_num_groups": AT_LEAST_1,
    "ldm.beta_schedule": _one_of("linear", "cosine"),
    "ldm.beta_start": (lambda v: 0 < v < 1, "must be in (0, 1)"),
    "ldm.beta_end": (lambda v: 0 < v < 1, "must be in (0, 1)"),
    "ldm.prediction_type": _one_of("epsilon", "v_prediction"),
    "ldm.class_dropout": SHARE,
    "ldm.ema_decay": SHARE,
    "ldm.batch_size": AT_LEAST_1,
    "ldm.epochs": POSITIVE,
    "ldm.lr": POSITIVE,
    "ldm.lr_schedule": _one_of("constant", "cosine"),
    "ldm.warmup_steps": NOT_NEGATIVE,
    "ldm.betas": BETAS,
    "ldm.gradient_clip": POSITIVE,
    "lora.rank": AT_LEAST_1,
    "lora.rank_schedule": _one_of("constant", "linear", "cosine"),
    "lora.rank_last": (lambda v: v is None or v >= 1, "must be null, or a whole number of at least 1"),
    "lora.alpha": (lambda v: v is None or v >= 1, "must be null, or a whole number of at least 1"),
    "lora.targets": (bool, "must be default, study, or module names with commas between"),
    "lora.train": _one_of("AB", "B"),
    "privacy.eps": (lambda v: v > 0, "must be above 0, or inf for no privacy"),
    "privacy.k": AT_LEAST_1,
    "privacy.max_grad_norm": POSITIVE,
    "privacy.batch_size": AT_LEAST_1,
    "privacy.epochs": POSITIVE,
    "privacy.accounting": _one_of("per_unit", "published"),
    "privacy.unit": _one_of("picture", "person"),
    "train.lr": POSITIVE,
    "train.embedding_lr": POSITIVE,
    "train.betas": BETAS,
    "train.lr_schedule": _one_of("constant", "cosine"),
    "train.lr_final": (lambda v: 0 <= v <= 1, "must be in [0, 1]"),
    "train.ema_decay": SHARE,
    "train.embedding_noise": NOT_NEGATIVE,
    "train.timestep_min": (lambda v: 0 <= v < 1000, "must be in [0, 1000)"),
    "train.timestep_max": (lambda v: 0 < v <= 1000, "must be in (0, 1000]"),
    "train.grid_every": NOT_NEGATIVE,
    "train.checkpoint_every": AT_LEAST_1,
    "sampling.n": AT_LEAST_1,
    "sampling.steps": (lambda v: 1 <= v <= 1000, "must be in [1, 1000]"),
    "sampling.eta": (lambda v: 0 <= v <= 1, "must be in [0, 1]"),
    "sampling.guidance_scale": NOT_NEGATIVE,
    "sampling.batch_size": AT_LEAST_1,
    "evaluation.inception_sha256": (
        lambda v: v is None or re.fullmatch(r"[0-9a-f]{64}", v) is not None,
        "must be null, or 64 hex digits",
    ),
    "evaluation.classifier_steps": AT_LEAST_1,
    "evaluation.public_reference": (lambda v: v in (None, "digits"), "must be null or digits"),
    "evaluation.min_images": (lambda v: v >= 2, "must be at least 2"),
    "compute.device": _one_of("auto", "cpu", "cuda"),
    "compute.physical_batch_size": AT_LEAST_1,
}

PUBLIC_STATEMENTS = (
    "data.classes and data.n_public are public statements and are never read off the data; set both, for example: "
    "overrides='data.classes=[CLASS_A,CLASS_B] data.n_public=NOMINAL_NUMBER_OF_UNITS'"
)


def check(config: DictConfig, typed: Mapping[str, str]) -> None:
    """Raise InputError for the first rule that a merged config breaks; `typed` maps a key to 'name=value' as typed."""
    missing = OmegaConf.missing_keys(config)
    if missing & {"data.classes", "data.n_public"}:
        raise InputError(f"{' and '.join(sorted(missing))} missing: {PUBLIC_STATEMENTS}")
    if missing:
        raise InputError(f"{', '.join(sorted(missing))}: missing in the config")

    def fail(key: str, rule: str) -> None:
        shown = f"{typed[key]} ({key})" if key in typed else f"{key}={OmegaConf.select(config, key)}"
        raise InputError(f"{shown}: {rule}")

    for key, (holds, rule) in RULES.items():
        value = OmegaConf.select(config, key)
        if not holds(value):
            fail(key, rule)
    bound = 1 / config.data.n_public
    if not 0 < config.privacy.delta < bound:
        fail("privacy.delta", f"must be above 0 and below 1/n_public ({bound:.2g})")
    if config.privacy.batch_size > config.data.n_public:
        fail(
            "privacy.batch_size",
            f"must be at most data.n_public ({config.data.n_public}): the sample rate is at most 1",
        )
    if config.train.timestep_min >= config.train.timestep_max:
        fail("train.timestep_min", f"must be below train.timestep_max ({config.train.timestep_max})")
    if len(config.ldm.attention) != len(config.ldm.block_out_channels):
        fail("ldm.attention", "must have one entry per entry of ldm.block_out_channels")
    if config.data.source == "folder" and not config.data.path:
        fail("data.path", "must name the folder of pictures; set overrides='data.path=DIR ...'")
    if config.privacy.reproducible != (config.privacy.seed_file is not None):
        fail("privacy.seed_file", "reproducible=true needs a seed_file, and a seed_file needs reproducible=true")
