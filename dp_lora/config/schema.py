"""Type and range of every configuration key; values and their meaning stand in configs/base.yaml, and only there."""

import math
import re
from dataclasses import dataclass, field

from omegaconf import MISSING

from dp_lora.config.picture_sources import PRIVATE_SOURCES, PUBLIC_SOURCES
from dp_lora.config.ranges import (
    AT_LEAST_1,
    BETAS,
    CHANNELS,
    CLASSES,
    COMMIT,
    FOLDER,
    MD5_SUMS,
    MIRROR,
    NOT_NEGATIVE,
    NULL_OR_AT_LEAST_1,
    NULL_OR_TEXT,
    POSITIVE,
    RANK,
    SHA256,
    SHARE,
    SIDE,
    WIDTHS,
    hex_digits,
    key,
    one_of,
)


@dataclass
class Experiment:
    name: str = MISSING
    description: str = MISSING
    seed: int = key((lambda v: 0 <= v < 2**63, "must be a whole number in [0, 2^63)"))


@dataclass
class Public:
    source: str = key(one_of(*PUBLIC_SOURCES))
    n: int = key(AT_LEAST_1)
    classes: list[str] = key(CLASSES)
    size: int = key(SIDE)
    channels: int = key(CHANNELS)
    folder: str | None = key(FOLDER, None)
    mirror: str | None = key(MIRROR, None)
    mirror_md5: list[str] | None = key(MD5_SUMS, None)


@dataclass
class Data:
    source: str = key(one_of(*PRIVATE_SOURCES))
    path: str | None = None
    folder: str | None = key(FOLDER, None)
    mirror: str | None = key(MIRROR, None)
    mirror_md5: list[str] | None = key(MD5_SUMS, None)
    classes: list[str] = key(CLASSES)
    n_public: int = key(AT_LEAST_1)
    size: int = key(SIDE)
    channels: int = key(CHANNELS)
    duplicates: str = key(one_of("warn", "refuse"))
    captions: bool = MISSING
    caption_column: str | None = None
    prompt: str | None = key(NULL_OR_TEXT, None)
    prompts: list[str] | None = None


@dataclass
class Huggingface:
    repo: str | None = None
    revision: str | None = key(COMMIT, None)
    train_files: list[str] | None = None
    test_files: list[str] | None = None
    train_rows: int | None = key(NULL_OR_AT_LEAST_1, None)
    test_rows: int | None = key((lambda v: v is None or v >= 0, "must be null, or a whole number of at least 0"), None)
    size: int | None = key((lambda v: v is None or v >= 1, "must be null, or a number of bytes"), None)
    image_column: str = key((bool, "must name a column"))
    label_column: str = key((bool, "must name a column"))
    licence: str | None = None


@dataclass
class Model:
    base: str = MISSING
    revision: str | None = key(COMMIT, None)
    privacy_status: str | None = key((lambda v: v in (None, "public"), "must be null or public"), None)


@dataclass
class Checkpoint:
    url: str | None = None
    folder: str | None = key(FOLDER, None)
    sha256: str | None = key(SHA256, None)
    ema: bool = MISSING
    member: str = key((lambda v: re.fullmatch(r"\w[\w.-]*", v) is not None, "must be the name of a file"))
    max_size: int = key(AT_LEAST_1)


@dataclass
class Autoencoder:
    kind: str = key(one_of("kl", "vq"))
    block_out_channels: list[int] = key(WIDTHS)
    layers_per_block: int = key(AT_LEAST_1)
    latent_channels: int = key(AT_LEAST_1)
    attention: list[bool] | None = None
    num_vq_embeddings: int | None = None
    norm_num_groups: int = key(AT_LEAST_1)
    mse_weight: float = key(NOT_NEGATIVE)
    l1_weight: float = key(NOT_NEGATIVE)
    lpips_weight: float = key(NOT_NEGATIVE)
    kl_weight: float = key(NOT_NEGATIVE)
    disc_start: int | None = key((lambda v: v is None or v >= 0, "must be null, or a step of at least 0"), None)
    disc_weight: float = key(NOT_NEGATIVE)
    recolour: float = key(SHARE)
    batch_size: int = key(AT_LEAST_1)
    epochs: float = key(POSITIVE)
    lr: float = key(POSITIVE)
    lr_schedule: str = key(one_of("constant", "cosine"))


@dataclass
class Ldm:
    block_out_channels: list[int] = key(WIDTHS)
    layers_per_block: int = key(AT_LEAST_1)
    attention: list[bool] = MISSING
    attention_head_width: int = key(AT_LEAST_1)
    attention_heads: int | None = key(NULL_OR_AT_LEAST_1, None)
    scale_shift: bool = MISSING
    residual_resampling: bool = MISSING
    cross_attention_dim: int = key(AT_LEAST_1)
    text_encoder: str | None = None
    norm_num_groups: int = key(AT_LEAST_1)
    beta_schedule: str = key(one_of("linear", "cosine"))
    beta_start: float = key((lambda v: 0 < v < 1, "must be in (0, 1)"))
    beta_end: float = key((lambda v: 0 < v < 1, "must be in (0, 1)"))
    prediction_type: str = key(one_of("epsilon", "v_prediction"))
    class_dropout: float = key(SHARE)
    ema_decay: float = key(SHARE)
    batch_size: int = key(AT_LEAST_1)
    epochs: float = key(POSITIVE)
    lr: float = key(POSITIVE)
    lr_schedule: str = key(one_of("constant", "cosine"))
    warmup_steps: int = key(NOT_NEGATIVE)
    betas: list[float] = key(BETAS)
    gradient_clip: float | None = key((lambda v: v is None or v > 0, "must be null, or above 0"), None)


@dataclass
class Lora:
    rank: int = key(RANK)
    rank_schedule: str = key(one_of("constant", "linear", "cosine"))
    rank_last: int | None = key(
        (lambda v: v is None or RANK[0](v), "must be null, or a whole number from 1 to 1024"), None
    )
    alpha: int | None = key(NULL_OR_AT_LEAST_1, None)
    targets: str = key((bool, "must be default, study, or module names with commas between"))
    train: str = key(one_of("AB", "B"))


@dataclass
class Privacy:
    eps: float = key((lambda v: 0 < v <= 100 or v == math.inf, "must be in (0, 100], or inf for no privacy"))
    delta: float = MISSING
    k: int = key((lambda v: 1 <= v <= 1000, "must be a whole number in [1, 1000]"))
    # float32 holds sums and noise within these bounds
    max_grad_norm: float = key((lambda v: 1e-6 <= v <= 1e6, "must be in [1e-6, 1e6]"))
    clipping: str = key(one_of("flat", "automatic"))
    batch_size: int = key(AT_LEAST_1)
    epochs: float = key(POSITIVE)
    unit: str = key(one_of("picture", "person"))
    accounting: str = key(one_of("per_unit", "published"))
    reproducible: bool = MISSING
    seed_file: str | None = None
    parent: str | None = key((lambda v: v is None or bool(v), "must be null, a folder, or an MLflow run id"), None)

    @property
    def guaranteed(self) -> bool:
        """Whether a fine-tuning with these settings may be published: `PrivacyPlan.guaranteed` of its plan."""
        return self.eps != math.inf and self.accounting == "per_unit"


@dataclass
class Train:
    lr: float = key(POSITIVE)
    lr_noise_exponent: float = key(NOT_NEGATIVE)
    embedding_lr: float = key(POSITIVE)
    betas: list[float] = key(BETAS)
    # below 0.001 float32 rounds what is left of the second moment
    noise_debias: float | None = key(
        (lambda v: v is None or 0.001 <= v <= 1000, "must be null, or in [0.001, 1000]"), None
    )
    lr_schedule: str = key(one_of("constant", "cosine"))
    lr_final: float = key((lambda v: 0 <= v <= 1, "must be in [0, 1]"))
    weight_decay: float = key(NOT_NEGATIVE)
    ema_decay: float = key(SHARE)
    tail_average: float | None = key((lambda v: v is None or 0 < v <= 1, "must be null, or in (0, 1]"), None)
    embedding_start: str = key((bool, "must be mean, zero, or a class of the base per class, commas between"))
    embedding_noise: float = key(NOT_NEGATIVE)
    caption_dropout: float = key(SHARE)
    timestep_min: int = key((lambda v: 0 <= v < 1000, "must be in [0, 1000)"))
    timestep_max: int = key((lambda v: 0 < v <= 1000, "must be in (0, 1000]"))
    grid_every: int = key(NOT_NEGATIVE)
    checkpoint_every: int = key(AT_LEAST_1)
    resume: str = key(
        (
            lambda v: v in ("auto", "never") or hex_digits(32)(v),
            "must be auto, never, or an MLflow run id (32 hex digits)",
        )
    )


@dataclass
class Sampling:
    n: int = key(AT_LEAST_1)
    steps: int | None = key((lambda v: v is None or 1 <= v <= 1000, "must be null, or in [1, 1000]"), None)
    eta: float = key((lambda v: 0 <= v <= 1, "must be in [0, 1]"))
    guidance_scale: float | None = key((lambda v: v is None or NOT_NEGATIVE[0](v), "must be null, or 0 or above"), None)
    attempts: int = key((lambda v: 1 <= v <= 100, "must be a whole number in [1, 100]"), 1)  # 1 in older runs
    prompts: str | None = None
    negative_prompt: str | None = None
    batch_size: int = key(AT_LEAST_1)
    precision: str = key(one_of("auto", "float32", "bfloat16"))


@dataclass
class Evaluation:
    inception_weights: str | None = None
    inception_sha256: str | None = key(SHA256, None)
    classifier_steps: int = key(AT_LEAST_1)
    public_reference: str | None = key((lambda v: v in (None, "digits"), "must be null or digits"), None)
    clip: str | None = None
    membership: bool = MISSING
    membership_beside: str | None = None
    min_images: int = key((lambda v: v >= 2, "must be at least 2"))


@dataclass
class Audit:
    level: str = key(one_of("step", "run"))
    canaries: int = key((lambda v: 100 <= v <= 1_000_000, "must be a whole number in [100, 1000000]"))
    delta: float | None = key((lambda v: v is None or 1e-10 <= v < 1, "must be null, or in [1e-10, 1)"), None)


@dataclass
class Compute:
    device: str = key(one_of("auto", "cpu", "cuda"))
    devices: int = key(AT_LEAST_1)
    num_nodes: int = key(AT_LEAST_1)
    rank_timeout_minutes: int = key((lambda v: 1 <= v <= 1440, "must be a whole number of minutes from 1 to 1440"))
    physical_batch_size: int | None = key(NULL_OR_AT_LEAST_1, None)
    captions: str = key(one_of("cached", "each_step"))
    checkpointing: str = key(one_of("auto", "always", "never"))
    precision: str = key(one_of("auto", "float32", "bfloat16"))


@dataclass
class Config:
    experiment: Experiment = field(default_factory=Experiment)
    public: Public = field(default_factory=Public)
    data: Data = field(default_factory=Data)
    huggingface: Huggingface = field(default_factory=Huggingface)
    model: Model = field(default_factory=Model)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    autoencoder: Autoencoder = field(default_factory=Autoencoder)
    ldm: Ldm = field(default_factory=Ldm)
    lora: Lora = field(default_factory=Lora)
    privacy: Privacy = field(default_factory=Privacy)
    train: Train = field(default_factory=Train)
    sampling: Sampling = field(default_factory=Sampling)
    evaluation: Evaluation = field(default_factory=Evaluation)
    audit: Audit = field(default_factory=Audit)
    compute: Compute = field(default_factory=Compute)
