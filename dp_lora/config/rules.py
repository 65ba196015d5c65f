"""What a value may be. Each error names the key as it was typed, the value, the rule and the way out."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields

from omegaconf import DictConfig, OmegaConf

from dp_lora.config.picture_sources import PRIVATE_SOURCES, PUBLIC_SOURCES
from dp_lora.config.ranges import OR_NONE, Rule
from dp_lora.config.schema import Config, Data
from dp_lora.errors import InputError

LOWEST_DELTA = 1e-10  # the accountant's own, which is not imported: it needs scipy

RULES: dict[str, Rule] = {
    f"{section}.{key.name}": key.metadata["rule"]
    for section, keys in vars(Config()).items()
    for key in fields(keys)
    if "rule" in key.metadata
}

# rules on private pictures: skipped for a config that only makes a base model (data.source: none)
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
    of_texts = config.data.captions or config.data.prompt is not None
    for key, (holds, rule) in (RULES | ({"data.classes": OR_NONE} if of_texts else {})).items():
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
    _check_evaluation(config, fail)
    _check_reproducible(config, fail)


def _check_captions(config: DictConfig, fail: Callable[[str, str], None]) -> None:
    data = config.data
    if data.captions and not PRIVATE_SOURCES[data.source].captions:
        fail("data.captions", f"must be false: data.source={data.source} has no captions")
    if (data.captions, data.prompt is not None, data.prompts is not None).count(True) > 1:
        fail(
            "data.captions",
            "must stand alone: set data.captions=false with data.prompt or data.prompts, and give one of these",
        )
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
    if config.privacy.accounting == "published" and config.privacy.clipping != "flat":
        fail("privacy.clipping", "the released code clips flat; set privacy.clipping=flat, or accounting=per_unit")
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
    for section, sources in (("public", PUBLIC_SOURCES), ("data", PRIVATE_SOURCES)):
        name = config[section].source
        if (config[section].folder is not None) != sources[name].downloaded:
            wanted = "must name a folder, such as data/NAME" if sources[name].downloaded else "must be null"
            fail(f"{section}.folder", f"{wanted}: {section}.source is {name}")
        for key in ("mirror", "mirror_md5"):
            if config[section][key] is not None and not sources[name].mirrored:
                fail(f"{section}.{key}", f"must be null: {section}.source is {name}")
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


def check_classes(data: Data) -> None:
    """Raise InputError for pictures without classes, or with prompts: a class-conditional base learns classes alone."""
    if not data.classes:
        raise InputError("data.classes=[]: this base learns classes, not captions; list at least one in data.classes")
    for key in ("prompt", "prompts"):
        if getattr(data, key) is not None:
            raise InputError(f"data.{key}: must be null: this base learns the names in data.classes, not prompts")


def check_shape(data: Data, size: int, channels: int) -> None:
    """InputError where a base for pictures of `size` pixels and `channels` channels meets data of another shape."""
    if (size, channels) != (data.size, data.channels):
        raise InputError(
            f"data.size={data.size}, data.channels={data.channels}: the base is for pictures of {size} pixels and "
            f"{channels} channels; set both so"
        )


def check_text(config: Config) -> None:
    """Raise InputError where the pictures do not suit a text-to-image base: three channels, and a text for each."""
    data = config.data
    if data.channels != 3:
        raise InputError(f"data.channels={data.channels}: must be 3: a text-to-image base draws in colour")
    if not (data.captions or data.prompt or data.prompts):
        raise InputError(
            f"model.base={config.model.base}: is conditioned on text: set data.captions=true (private captions), "
            "data.prompts (one public prompt per class) or data.prompt (one for all)"
        )


def _check_evaluation(config: DictConfig, fail: Callable[[str, str], None]) -> None:
    if config.evaluation.membership_beside is not None and not config.evaluation.membership:
        fail("evaluation.membership_beside", "stands beside the samples' adapter; set evaluation.membership=true too")
