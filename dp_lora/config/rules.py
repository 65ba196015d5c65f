"""What a value may be. Each error names the key as it was typed, the value, the rule and the way out."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dp_lora.config.schema import Config, Data
from dp_lora.errors import InputError

Rule = tuple[Callable[[Any], bool], str]

LOWEST_DELTA = 1e-10  # as dp_lora.privacy.accounting has it


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


POSITIVE: Rule = (lambda v: _number(v) and v > 0, "must be above 0")
NOT_NEGATIVE: Rule = (lambda v: _number(v) and v >= 0, "must be 0 or above")
AT_LEAST_1: Rule = (lambda v: v >= 1, "must be a whole number of at least 1")
# above a layer's width it adds nothing
RANK: Rule = (lambda v: 1 <= v <= 1024, "must be a whole number from 1 to 1024")
SHARE: Rule = (lambda v: _number(v) and 0 <= v < 1, "must be in [0, 1)")
BETAS: Rule = (lambda v: len(v) == 2 and all(0 <= b < 1 for b in v), "must be two numbers in [0, 1)")
WIDTHS: Rule = (lambda v: len(v) >= 1 and all(w >= 1 for w in v), "must list at least one width of at least 1")


def _one_of(*names: str) -> Rule:
    return (lambda v: v in names, f"must be one of {', '.join(names)}")


def _hex(digits: int) -> Callable[[str], bool]:
    return lambda v: re.fullmatch(rf"[0-9a-f]{{{digits}}}", v) is not None


FOLDER: Rule = (
    lambda v: v is None or re.fullmatch(r"data/[A-Za-z0-9][A-Za-z0-9_-]*", v) is not None,
    "must be null, or data/NAME",
)
MIRROR: Rule = (
    lambda v: v is None or v.startswith(("http://", "https://")),
    "must be null, or an address that begins with http",
)
SHA256: Rule = (lambda v: v is None or _hex(64)(v), "must be null, or 64 hex digits")
NULL_OR_AT_LEAST_1: Rule = (lambda v: v is None or v >= 1, "must be null, or a whole number of at least 1")
MD5_SUMS: Rule = (lambda v: v is None or all(map(_hex(32), v)), "must be null, or a list of MD5 sums")


def _distinct(value: list[str]) -> bool:
    return len(value) >= 1 and len(set(value)) == len(value) and all(value)


CLASSES: Rule = (_distinct, "must list at least one class, and each once (none only with data.captions)")
WITH_CAPTIONS: Rule = (lambda v: not v or _distinct(v), "must list each class once, or none")

RULES: dict[str, Rule] = {
    "experiment.seed": (lambda v: 0 <= v < 2**63, "must be a whole number in [0, 2^63)"),
    "public.source": _one_of("letters", "emnist", "imagenet"),
    "public.n": AT_LEAST_1,
    "public.classes": CLASSES,
    "public.size": (lambda v: v in (8, 16, 32, 64, 128, 256, 512), "must be a power of two from 8 to 512"),
    "public.channels": (lambda v: v in (1, 3), "must be 1 or 3"),
    "data.source": _one_of("mnist5k", "digits", "folder", "mnist", "huggingface", "none"),
    "data.classes": CLASSES,
    "data.n_public": AT_LEAST_1,
    "data.size": (lambda v: v in (8, 16, 32, 64, 128, 256, 512), "must be a power of two from 8 to 512"),
    "data.channels": (lambda v: v in (1, 3), "must be 1 or 3"),
    "data.duplicates": _one_of("warn", "refuse"),
    "public.folder": FOLDER,
    "public.mirror": MIRROR,
    "public.mirror_md5": MD5_SUMS,
    "data.folder": FOLDER,
    "data.mirror": MIRROR,
    "data.mirror_md5": MD5_SUMS,
    "huggingface.revision": (lambda v: v is None or _hex(40)(v), "must be null, or a commit of 40 hex digits"),
    "huggingface.train_rows": NULL_OR_AT_LEAST_1,
    "huggingface.test_rows": (lambda v: v is None or v >= 0, "must be null, or a whole number of at least 0"),
    "huggingface.size": (lambda v: v is None or v >= 1, "must be null, or a number of bytes"),
    "huggingface.image_column": (bool, "must name a column"),
    "huggingface.label_column": (bool, "must name a column"),
    "checkpoint.folder": FOLDER,
    "checkpoint.sha256": SHA256,
    "checkpoint.member": (lambda v: re.fullmatch(r"\w[\w.-]*", v) is not None, "must be the name of a file"),
    "checkpoint.max_size": AT_LEAST_1,
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
    "ldm.attention_heads": NULL_OR_AT_LEAST_1,
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
    "ldm.gradient_clip": (lambda v: v is None or v > 0, "must be null, or above 0"),
    "lora.rank": RANK,
    "lora.rank_schedule": _one_of("constant", "linear", "cosine"),
    "lora.rank_last": (lambda v: v is None or RANK[0](v), "must be null, or a whole number from 1 to 1024"),
    "lora.alpha": NULL_OR_AT_LEAST_1,
    "lora.targets": (bool, "must be default, study, or module names with commas between"),
    "lora.train": _one_of("AB", "B"),
    "model.revision": (lambda v: v is None or _hex(40)(v), "must be null, or a commit of 40 hex digits"),
    "model.privacy_status": (lambda v: v in (None, "public"), "must be null or public"),
    "privacy.eps": (lambda v: 0 < v <= 100 or v == math.inf, "must be in (0, 100], or inf for no privacy"),
    "privacy.k": (lambda v: 1 <= v <= 1000, "must be a whole number in [1, 1000]"),
    # float32 holds sums and noise within these bounds
    "privacy.max_grad_norm": (lambda v: 1e-6 <= v <= 1e6, "must be in [1e-6, 1e6]"),
    "privacy.batch_size": AT_LEAST_1,
    "privacy.epochs": POSITIVE,
    "privacy.accounting": _one_of("per_unit", "published"),
    "privacy.unit": _one_of("picture", "person"),
    "privacy.parent": (lambda v: v is None or bool(v), "must be null, a folder, or an MLflow run id"),
    "train.lr": POSITIVE,
    "train.lr_noise_exponent": NOT_NEGATIVE,
    "train.embedding_lr": POSITIVE,
    "train.betas": BETAS,
    "train.lr_schedule": _one_of("constant", "cosine"),
    "train.lr_final": (lambda v: 0 <= v <= 1, "must be in [0, 1]"),
    "train.weight_decay": NOT_NEGATIVE,
    "train.ema_decay": SHARE,
    "train.embedding_start": (bool, "must be mean, zero, or a class of the base per class, commas between"),
    "train.embedding_noise": NOT_NEGATIVE,
    "train.timestep_min": (lambda v: 0 <= v < 1000, "must be in [0, 1000)"),
    "train.timestep_max": (lambda v: 0 < v <= 1000, "must be in (0, 1000]"),
    "train.grid_every": NOT_NEGATIVE,
    "train.checkpoint_every": AT_LEAST_1,
    "train.resume": (
        lambda v: v in ("auto", "never") or _hex(32)(v),
        "must be auto, never, or an MLflow run id (32 hex digits)",
    ),
    "sampling.n": AT_LEAST_1,
    "sampling.steps": (lambda v: 1 <= v <= 1000, "must be in [1, 1000]"),
    "sampling.eta": (lambda v: 0 <= v <= 1, "must be in [0, 1]"),
    "sampling.guidance_scale": NOT_NEGATIVE,
    "sampling.batch_size": AT_LEAST_1,
    "sampling.precision": _one_of("auto", "float32", "bfloat16"),
    "evaluation.inception_sha256": SHA256,
    "evaluation.classifier_steps": AT_LEAST_1,
    "evaluation.public_reference": (lambda v: v in (None, "digits"), "must be null or digits"),
    "evaluation.min_images": (lambda v: v >= 2, "must be at least 2"),
    "compute.device": _one_of("auto", "cpu", "cuda"),
    "compute.devices": AT_LEAST_1,
    "compute.num_nodes": AT_LEAST_1,
    "compute.physical_batch_size": NULL_OR_AT_LEAST_1,
    "compute.checkpointing": _one_of("auto", "always", "never"),
    "compute.precision": _one_of("auto", "float32", "bfloat16"),
}

# rules on private pictures, of which a config that only makes a base model (data.source: none) has none
PRIVATE_RULES = ("data.classes", "data.n_public")

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
        value = OmegaConf.select(config, key)
        shown = f"{typed[key]} ({key})" if key in typed else f"{key}={'null' if value is None else value}"
        raise InputError(f"{shown}: {rule}")

    private = config.data.source != "none"
    with_captions = {"data.classes": WITH_CAPTIONS} if config.data.captions else {}
    for key, (holds, rule) in (RULES | with_captions).items():
        value = OmegaConf.select(config, key)
        if (private or key not in PRIVATE_RULES) and not holds(value):
            fail(key, rule)
    bound = 1 / config.data.n_public if private else 1
    if not LOWEST_DELTA <= config.privacy.delta < bound:
        fail("privacy.delta", f"must be at least {LOWEST_DELTA:g} and below 1/n_public ({bound:.2g})")
    if private:
        _check_sampling(config, fail)
    if config.train.timestep_min >= config.train.timestep_max:
        fail("train.timestep_min", f"must be below train.timestep_max ({config.train.timestep_max})")
    if len(config.ldm.attention) != len(config.ldm.block_out_channels):
        fail("ldm.attention", "must have one entry per entry of ldm.block_out_channels")
    _check_lora_and_accounting(config, fail)
    autoencoder = config.autoencoder
    if autoencoder.attention is not None and len(autoencoder.attention) != len(autoencoder.block_out_channels):
        fail("autoencoder.attention", "must be null, or have one entry per entry of autoencoder.block_out_channels")
    entries = autoencoder.num_vq_embeddings
    if (entries is not None) != (autoencoder.kind == "vq") or (entries is not None and entries < 1):
        fail("autoencoder.num_vq_embeddings", "must be at least 1 with autoencoder.kind=vq, and null with kl")
    if config.data.source == "folder" and not config.data.path:
        fail("data.path", "must name the folder of pictures; set overrides='data.path=DIR ...'")
    if config.model.revision is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", config.model.base):
        fail("model.base", "must be the id of a model on the Hub, OWNER/NAME, where model.revision is set")
    _check_captions(config, fail)
    _check_downloads(config, fail)
    _check_reproducible(config, fail)


def _check_captions(config: DictConfig, fail: Callable[[str, str], None]) -> None:
    data = config.data
    if data.captions and data.source not in ("folder", "huggingface"):
        fail("data.captions", f"must be false: data.source={data.source} has no captions")
    if (data.captions, data.prompt is not None, data.prompts is not None).count(True) > 1:
        fail("data.captions", "must stand alone: give captions, one data.prompt, or data.prompts, one per class")
    if data.prompts is not None and (len(data.prompts) != len(data.classes) or not all(map(str.strip, data.prompts))):
        fail("data.prompts", "must have one prompt for each of data.classes")
    if data.caption_column is not None and not (data.captions and data.caption_column):
        fail("data.caption_column", "must be null, or name a column, with data.captions=true")


def _check_reproducible(config: DictConfig, fail: Callable[[str, str], None]) -> None:
    if config.privacy.reproducible != (config.privacy.seed_file is not None):
        fail("privacy.seed_file", "reproducible=true needs a seed_file, and a seed_file needs reproducible=true")
    if config.privacy.reproducible and config.compute.physical_batch_size is None:
        fail("compute.physical_batch_size", "must be set with privacy.reproducible=true: another cut rounds otherwise")


def _check_lora_and_accounting(config: DictConfig, fail: Callable[[str, str], None]) -> None:
    if config.privacy.accounting == "published" and config.privacy.unit != "picture":
        fail("privacy.accounting", "the released code knows no persons; set privacy.unit=picture, or per_unit")
    if config.privacy.accounting == "published" and config.privacy.eps == math.inf:
        fail("privacy.accounting", "compares two epsilons, and eps=inf has none; set a finite eps, or per_unit")
    if config.privacy.parent is not None and (
        config.privacy.eps == math.inf or config.privacy.accounting != "per_unit"
    ):
        fail("privacy.parent", "must be null with eps=inf or accounting=published: there is no epsilon to add to")
    if (config.lora.rank_schedule == "constant") != (config.lora.rank_last is None):
        fail("lora.rank_last", "must be set with rank_schedule linear or cosine, and null with constant")
    if config.lora.rank_schedule != "constant" and config.lora.alpha is not None:
        fail("lora.alpha", "must be null with a rank_schedule: each layer's alpha is its rank")


def _check_downloads(config: DictConfig, fail: Callable[[str, str], None]) -> None:
    for section, downloaded in (("public", ("emnist",)), ("data", ("mnist", "huggingface"))):
        source = config[section].source
        if (config[section].folder is not None) != (source in downloaded):
            wanted = "must name a folder, such as data/NAME" if source in downloaded else "must be null"
            fail(f"{section}.folder", f"{wanted}: {section}.source is {source}")
        for key in ("mirror", "mirror_md5"):
            if config[section][key] is not None and source not in ("emnist", "mnist"):
                fail(f"{section}.{key}", f"must be null: {section}.source is {source}")
    if (config.checkpoint.url is None) != (config.checkpoint.folder is None):
        fail("checkpoint.folder", "checkpoint.url and checkpoint.folder go together: set both, or none")
    if config.data.source == "huggingface":
        for key in ("repo", "revision", "train_files", "test_files", "train_rows", "test_rows", "size", "licence"):
            if config.huggingface[key] is None:
                fail(f"huggingface.{key}", "must be set: data.source is huggingface")
    folders = [config[section].folder for section in ("public", "data", "checkpoint")]
    if len(set(folders) - {None}) < len([folder for folder in folders if folder is not None]):
        fail("data.folder", "public.folder, data.folder and checkpoint.folder must differ")


def _check_sampling(config: DictConfig, fail: Callable[[str, str], None]) -> None:
    n_public, batch_size = config.data.n_public, config.privacy.batch_size
    if batch_size > n_public:
        fail("privacy.batch_size", f"must be at most data.n_public ({n_public}): the sample rate is at most 1")
    if config.privacy.epochs * n_public > 1e6 * batch_size:
        fail("privacy.epochs", "must give at most 1,000,000 steps: steps = epochs * n_public / batch_size")


def check_shape(data: Data, size: int, channels: int) -> None:
    """InputError where a base for pictures of `size` pixels and `channels` channels meets data of another shape."""
    if (size, channels) != (data.size, data.channels):
        raise InputError(
            f"data.size={data.size}, data.channels={data.channels}: the base is for pictures of {size} pixels and "
            f"{channels} channels; set both so"
        )


def check_text(config: Config) -> None:
    """InputError where the pictures do not suit a text-to-image base: three channels, and a text for each."""
    data = config.data
    if data.channels != 3:
        raise InputError(f"data.channels={data.channels}: must be 3: a text-to-image base draws in colour")
    if not (data.captions or data.prompt or data.prompts):
        raise InputError(
            f"model.base={config.model.base}: is conditioned on text: set data.captions=true (private captions), "
            "data.prompts (one public prompt per class) or data.prompt (one for all)"
        )
