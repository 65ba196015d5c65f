"""Where a private fine-tuning starts: base, plan, parent and pictures, resolved once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dp_lora.config.rules import check_classes, check_shape, check_text
from dp_lora.config.schema import Config
from dp_lora.errors import InputError
from dp_lora.models.embedding_start import start_positions
from dp_lora.models.info import load_info, model_digest
from dp_lora.models.pipeline_index import steps_and_guidance
from dp_lora.models.shapes import BaseShapes
from dp_lora.privacy.composition import ReleaseCost, base_parts
from dp_lora.privacy.plan import PrivacyPlan


@dataclass(frozen=True)
class Resolved:
    """A fine-tuning before any of its pictures is read: the same for a dry run, each rank and the training."""

    config: Config
    base: Path  # folder of the base model; at a dry run it may be missing
    shapes: BaseShapes  # of its tensors
    base_name: str  # name in the release: no folder of this machine
    data: Path  # folder of the prepared private pictures
    latents: Path  # folder of these pictures' latents
    plan: PrivacyPlan
    parent: tuple[ReleaseCost, ...]  # costs of privacy.parent, its own parents included
    audits: Path  # file of the audits of the experiment's private step
    resumed: Path | None  # the working folder that train.resume names; None: auto and never

    def spent_by_base(self) -> tuple[ReleaseCost, ...]:
        """Privacy cost of the base, on its own private pictures; none where it is public or missing."""
        if not self.base.exists():
            return ()
        # the digest is a function: reading a whole public base, as nearly all are, would make a dry run slow
        return base_parts(stated_info(self.config, self.base), lambda: model_digest(self.base), self.plan)


def stated_info(config: Config, base: Path) -> dict[str, Any]:
    """model.json of a base; for a pipeline its equivalent, with the privacy status that the config states.

    Raises InputError for model.privacy_status where the base states its own.
    """
    info = load_info(base)
    if config.model.privacy_status is not None and (base / "model.json").exists():
        raise InputError(
            f"model.privacy_status={config.model.privacy_status}: must be null: model.json of the base says "
            f"{info['privacy_status']}"
        )
    if "pipeline" not in info:
        return info
    return info | {"privacy_status": config.model.privacy_status or info["privacy_status"]}


def check_base(start: Resolved) -> None:
    """InputError for a base that no fine-tuning can start from. Reads only its model.json, so it costs no time."""
    config, info = start.config, stated_info(start.config, start.base)
    _, scale = steps_and_guidance(config.sampling, start.shapes.family)
    if not start.shapes.family.of_classes:
        check_text(config)
        start.spent_by_base()
        return
    check_classes(config.data)
    if "pipeline" in info and len(config.data.classes) > len(info["classes"]):
        # one row more would be the stock pipeline's 'no class'
        raise InputError(f"data.classes: the base has rows for {len(info['classes']):,} classes; list at most as many")
    start_positions(config.train.embedding_start, info["classes"], len(config.data.classes))
    start.spent_by_base()
    if scale != 1 and not info["null_row"]:
        raise InputError(f"sampling.guidance_scale={scale:g}: the base has no null row; must be 1")
    if config.train.caption_dropout:
        raise InputError("train.caption_dropout: must be 0: the base is conditioned on classes, not on captions")
    check_shape(config.data, info["size"], info["channels"])
