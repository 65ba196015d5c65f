"""Where a private fine-tuning starts: base, plan, parent and pictures, resolved once."""

from dataclasses import dataclass
from pathlib import Path

from dp_lora.config.rules import check_shape
from dp_lora.config.schema import Config
from dp_lora.errors import InputError
from dp_lora.models.adapters import start_positions
from dp_lora.models.folder import load_info, model_digest
from dp_lora.privacy.composition import ReleaseCost
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.release import base_parts


@dataclass(frozen=True)
class Resolved:
    """A fine-tuning before anything is read of its pictures: the same for a dry run, each rank and the training."""

    config: Config
    base: Path  # folder of the base model; before a dry run it may not be there
    base_name: str  # as the release names it: no folder of this machine
    data: Path  # folder of the prepared private pictures
    latents: Path  # folder that these are kept in, encoded
    plan: PrivacyPlan
    parent: tuple[ReleaseCost, ...]  # what privacy.parent has spent, its own parents included
    resumed: Path | None  # the working folder that train.resume names; None: auto and never

    def spent_by_base(self) -> tuple[ReleaseCost, ...]:
        """What the base has spent of the privacy of its own private pictures; none where it is public or not there."""
        if not self.base.exists():
            return ()
        # a public base, as nearly all are, is not read through for its digest: a dry run is quick
        return base_parts(load_info(self.base), lambda: model_digest(self.base), self.plan)


def check_base(start: Resolved) -> None:
    """InputError for a base that cannot be started from. Reads its model.json alone, so it costs no time."""
    config, info = start.config, load_info(start.base)
    start_positions(config.train.embedding_start, info["classes"], len(config.data.classes))
    start.spent_by_base()
    if config.sampling.guidance_scale != 1 and not info["null_row"]:
        raise InputError(
            f"sampling.guidance_scale={config.sampling.guidance_scale:g}: the base has no null row; must be 1"
        )
    check_shape(config.data, info["size"], info["channels"])
