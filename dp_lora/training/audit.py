"""Audits of an experiment: of the private step with its plan, or of all of its fine-tuning."""

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dp_lora.config.schema import Config
from dp_lora.events import Events
from dp_lora.models.device import full_precision
from dp_lora.models.folder import Model
from dp_lora.privacy.audit import Audit, audit_of, audit_step
from dp_lora.privacy.audit_canaries import spreads, toss
from dp_lora.privacy.audit_record import record_audit
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.privacy.randomness import Randomness
from dp_lora.team import Team
from dp_lora.training.canaries import Canaries
from dp_lora.training.finetune import assist, finetune
from dp_lora.training.plan import make_plan
from dp_lora.training.private_run import Inputs, encoded
from dp_lora.training.run_folder import code_digest, open_run_folder

DATE = "%Y-%m-%d"


@dataclass(frozen=True)
class Audited:
    """An audit, and what it is drawn from."""

    plan: PrivacyPlan
    audit: Audit
    scores: dict[str, NDArray[np.float64]]  # of each canary, high where it seems to be in
    coins: NDArray[np.bool_]  # which canaries were in


def audit_private_step(config: Config, device: torch.device) -> Audited:
    """Audit of level `step`: the code's own private step, with the plan of `config` and made-up units alone."""
    plan = make_plan(config)
    with full_precision():
        audit, scores, coins = audit_step(plan, config.audit.canaries, device, config.audit.delta)
    return Audited(plan, audit, scores, coins)


def audit_fine_tuning(inputs: Inputs, folder: Path, team: Team) -> Audited:
    """Audit of level `run`: the whole fine-tuning of `config` with canaries among its private pictures, in `folder`.

    The first rank of `team` calls this, the others `assist_audit`. `folder`, with ledger and checkpoints, is removed.

    Guarantee: none: what is found was computed in a run on private data, and is for the operator alone. Nothing that
    was trained with canaries outlives the call.
    """
    config, plan = inputs.start.config, inputs.start.plan
    randomness = Randomness("audit")
    coins = team.once(toss(config.audit.canaries, randomness))
    data = encoded(inputs, Events(), team)
    canaries = Canaries.beside(len(data.latents), coins, plan)
    quiet = replace(config, train=replace(config.train, grid_every=0, resume="auto"))
    # another binding than any fine-tuning's: nobody goes on in this folder
    bound = inputs.bound | {"canaries": len(coins)}
    try:
        with open_run_folder(folder / "run", quiet, bound) as run:
            names = inputs.base
            finetune(
                quiet, inputs.model, names, data.with_canaries(canaries), run, inputs.device, Events(), _no_grid, team
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seen = np.stack(canaries.seen)
    with full_precision():
        worlds = spreads(plan, randomness, inputs.device)
    audit, scores = audit_of(plan, seen, coins, worlds, config.audit.delta or plan.delta)
    return Audited(plan, audit, scores, coins)


def assist_audit(inputs: Inputs, team: Team) -> None:
    """Every other rank's part of `audit_fine_tuning`."""
    coins = team.once()
    data = encoded(inputs, Events(), team)
    canaries = Canaries.beside(len(data.latents), coins, inputs.start.plan)
    assist(inputs.start.config, inputs.model, data.with_canaries(canaries), inputs.device, team)


def _no_grid(_model: Model, _path: Path) -> None:
    """Nothing is drawn with weights that were trained beside canaries."""


def keep_record(audited: Audited, path: Path) -> dict[str, Any]:
    """Append an audit of level `step` to the experiment's records, which its releases name; gives the record."""
    return record_audit(path, audited.audit.as_json(), audited.plan, code_digest(), time.strftime(DATE, time.gmtime()))
