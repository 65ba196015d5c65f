"""The one table of stages: what each is, takes on its command line, reads, and depends on."""

from collections.abc import Mapping
from dataclasses import dataclass, field

# Each command-line parameter, and the key that it sets.
PARAMETERS = {
    "eps": "privacy.eps",
    "delta": "privacy.delta",
    "rank": "lora.rank",
    "k": "privacy.k",
    "max_grad_norm": "privacy.max_grad_norm",
    "batch_size": "privacy.batch_size",
    "epochs": "privacy.epochs",
    "lr": "train.lr",
    "seed": "experiment.seed",
}
PRETRAINING = ("config", "batch_size", "epochs", "lr", "seed", "overrides")


def _own(section: str) -> dict[str, str]:
    return {name: f"{section}.{name}" for name in ("batch_size", "epochs", "lr")}


@dataclass(frozen=True)
class Stage:
    """One entry point that opens a run. MLproject, the commands and README have the same `parameters`."""

    name: str
    about: str  # the UI's description of its runs
    parameters: tuple[str, ...]
    keys: Mapping[str, str] = field(default_factory=dict)  # parameters that set another key than PARAMETERS says
    default_config: str = "mnist5k"
    reads_private: bool = False  # works on private pictures, itself or in the stages that it starts
    needs_private: bool = False  # a config without private pictures (data.source=none) is refused
    noisy: bool = False  # its result shows what a fine-tuned model has learnt, and depends on the noise
    named_by_privacy: bool = False  # its runs are named by epsilon, rank and k
    scored: bool = False  # its runs have epsilon and scores
    computes: bool = False  # runs on compute.device
    ranked: bool = False  # its own process is a rank: compute.devices x compute.num_nodes of them share the work
    folder: str | None = None  # folder of its result, below outputs/EXPERIMENT; None: elsewhere, or several
    before: tuple[str, ...] = ()  # stages of the same experiment that it builds on, except those on public data

    @property
    def public(self) -> bool:
        """Whether its result is made from public data alone."""
        return not self.reads_private and not self.noisy

    @property
    def sets(self) -> dict[str, str]:
        """Its parameters that set a key, and the key."""
        return {name: key for name, key in (PARAMETERS | dict(self.keys)).items() if name in self.parameters}


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "main",
            "The whole chain, from pictures to scores.",
            ("config", *PARAMETERS, "overrides"),
            reads_private=True,
            needs_private=True,
            noisy=True,
            named_by_privacy=True,
            scored=True,
            computes=True,
            before=("prepare",),
        ),
        Stage(
            "prepare",
            "Pictures in the project's one layout.",
            ("config", "seed", "overrides"),
            reads_private=True,
        ),
        Stage(
            "pretrain_ae",
            "Autoencoder of public pictures.",
            PRETRAINING,
            keys=_own("autoencoder"),
            computes=True,
        ),
        Stage(
            "pretrain_ldm",
            "Latent diffusion model of public pictures.",
            PRETRAINING,
            keys=_own("ldm"),
            computes=True,
        ),
        Stage(
            "import_base",
            "Base model from a checkpoint in the original layout.",
            ("config", "overrides"),
            default_config="cin256",  # the default experiment imports nothing
        ),
        Stage(
            "finetune",
            "LoRA weights and class embedding, fine-tuned on the private pictures.",
            ("config", *PARAMETERS, "overrides"),
            reads_private=True,
            needs_private=True,
            noisy=True,
            named_by_privacy=True,
            computes=True,
            ranked=True,
            folder="finetune",
            before=("prepare",),
        ),
        Stage(
            "sample",
            "DDIM samples of the fine-tuned model.",
            ("config", "adapter", "seed", "overrides"),
            noisy=True,
            named_by_privacy=True,
            computes=True,
            ranked=True,
            folder="samples",
            before=("prepare", "finetune"),
        ),
        Stage(
            "fid",
            "Distances and utility of samples. The scores read private pictures without noise: for the operator alone.",
            ("config", "samples", "overrides"),
            reads_private=True,
            needs_private=True,
            noisy=True,
            named_by_privacy=True,
            scored=True,
            computes=True,
            folder="evaluation",
            before=("prepare", "finetune", "sample"),
        ),
        Stage(
            "count_params",
            "Total, trainable, LoRA and embedding parameters.",
            ("config", "rank", "overrides"),
            folder="count_params",
        ),
        Stage(
            "audit",
            "What an attack on the private step refutes of the epsilon that is claimed.",
            ("config", *PARAMETERS, "overrides"),
            reads_private=True,  # audit.level=run
            needs_private=True,
            named_by_privacy=True,
            computes=True,
            ranked=True,
        ),
        Stage(
            "export",
            "Base and adapter merged, for stock diffusers.",
            ("config", "adapter", "overrides"),
            noisy=True,
        ),
        Stage(
            "study",
            "A comparison: many fine-tunings with their samples and scores, and a report of them.",
            ("study", "jobs", "slurm", "overrides"),
            reads_private=True,
            needs_private=True,
            noisy=True,
            before=("prepare",),
        ),
    )
}
