"""The types of every configuration key; values and their meaning stand in configs/base.yaml, and only there."""

import math
from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass
class Experiment:
    name: str = MISSING
    description: str = MISSING
    seed: int = MISSING


@dataclass
class Public:
    source: str = MISSING
    n: int = MISSING
    classes: list[str] = MISSING
    size: int = MISSING
    channels: int = MISSING
    folder: str | None = None
    mirror: str | None = None
    mirror_md5: list[str] | None = None


@dataclass
class Data:
    source: str = MISSING
    path: str | None = None
    folder: str | None = None
    mirror: str | None = None
    mirror_md5: list[str] | None = None
    classes: list[str] = MISSING
    n_public: int = MISSING
    size: int = MISSING
    channels: int = MISSING
    duplicates: str = MISSING
    captions: bool = MISSING
    caption_column: str | None = None
    prompt: str | None = None
    prompts: list[str] | None = None


@dataclass
class Huggingface:
    repo: str | None = None
    revision: str | None = None
    train_files: list[str] | None = None
    test_files: list[str] | None = None
    train_rows: int | None = None
    test_rows: int | None = None
    size: int | None = None
    image_column: str = MISSING
    label_column: str = MISSING
    licence: str | None = None


@dataclass
class Model:
    base: str = MISSING
    revision: str | None = None
    privacy_status: str | None = None


@dataclass
class Checkpoint:
    url: str | None = None
    folder: str | None = None
    sha256: str | None = None
    ema: bool = MISSING
    member: str = MISSING
    max_size: int = MISSING


@dataclass
class Autoencoder:
    kind: str = MISSING
    block_out_channels: list[int] = MISSING
    layers_per_block: int = MISSING
    latent_channels: int = MISSING
    attention: list[bool] | None = None
    num_vq_embeddings: int | None = None
    norm_num_groups: int = MISSING
    mse_weight: float = MISSING
    l1_weight: float = MISSING
    lpips_weight: float = MISSING
    kl_weight: float = MISSING
    disc_start: int | None = None
    disc_weight: float = MISSING
    batch_size: int = MISSING
    epochs: float = MISSING
    lr: float = MISSING
    lr_schedule: str = MISSING


@dataclass
class Ldm:
    block_out_channels: list[int] = MISSING
    layers_per_block: int = MISSING
    attention: list[bool] = MISSING
    attention_head_width: int = MISSING
    attention_heads: int | None = None
    scale_shift: bool = MISSING
    residual_resampling: bool = MISSING
    cross_attention_dim: int = MISSING
    norm_num_groups: int = MISSING
    beta_schedule: str = MISSING
    beta_start: float = MISSING
    beta_end: float = MISSING
    prediction_type: str = MISSING
    class_dropout: float = MISSING
    ema_decay: float = MISSING
    batch_size: int = MISSING
    epochs: float = MISSING
    lr: float = MISSING
    lr_schedule: str = MISSING
    warmup_steps: int = MISSING
    betas: list[float] = MISSING
    gradient_clip: float | None = None


@dataclass
class Lora:
    rank: int = MISSING
    rank_schedule: str = MISSING
    rank_last: int | None = None
    alpha: int | None = None
    targets: str = MISSING
    train: str = MISSING


@dataclass
class Privacy:
    eps: float = MISSING
    delta: float = MISSING
    k: int = MISSING
    max_grad_norm: float = MISSING
    batch_size: int = MISSING
    epochs: float = MISSING
    unit: str = MISSING
    accounting: str = MISSING
    reproducible: bool = MISSING
    seed_file: str | None = None
    parent: str | None = None

    @property
    def guaranteed(self) -> bool:
        """Whether a fine-tuning with these settings may leave the house: `PrivacyPlan.guaranteed` of its plan."""
        return self.eps != math.inf and self.accounting == "per_unit"


@dataclass
class Train:
    lr: float = MISSING
    lr_noise_exponent: float = MISSING
    embedding_lr: float = MISSING
    betas: list[float] = MISSING
    lr_schedule: str = MISSING
    lr_final: float = MISSING
    weight_decay: float = MISSING
    ema_decay: float = MISSING
    embedding_start: str = MISSING
    embedding_noise: float = MISSING
    timestep_min: int = MISSING
    timestep_max: int = MISSING
    grid_every: int = MISSING
    checkpoint_every: int = MISSING
    resume: str = MISSING


@dataclass
class Sampling:
    n: int = MISSING
    steps: int = MISSING
    eta: float = MISSING
    guidance_scale: float = MISSING
    prompts: str | None = None
    negative_prompt: str | None = None
    batch_size: int = MISSING
    precision: str = MISSING


@dataclass
class Evaluation:
    inception_weights: str | None = None
    inception_sha256: str | None = None
    classifier_steps: int = MISSING
    public_reference: str | None = None
    min_images: int = MISSING


@dataclass
class Compute:
    device: str = MISSING
    devices: int = MISSING
    num_nodes: int = MISSING
    physical_batch_size: int | None = None
    checkpointing: str = MISSING
    precision: str = MISSING


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
    compute: Compute = field(default_factory=Compute)
