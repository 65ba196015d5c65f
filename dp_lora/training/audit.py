"""Audits of an experiment: of the private step with its plan, or of all of its fine-tuning."""

import shutil
import time
from collections.abc import Mapping
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
from dp_lora.training.finetune import PrivateData, assist, finetune
from dp_lora.training.private_run import Inputs, encoded
from dp_lora.training.run_folder import open_run_folder
from dp_lora.training.step_code import code_digest

DATE = "%Y-%m-%d"


@dataclass(frozen=True)
class Audited:
    """An audit, and the data behind it."""

    plan: PrivacyPlan
    audit: Audit
    scores: dict[str, NDArray[np.float64]]  # of each canary, high where it seems to be in
    coins: NDArray[np.bool_]  # which canaries were in


def audit_private_step(config: Config, plan: PrivacyPlan, device: torch.device) -> Audited:
    """Audit of level `step`: the code's own private step, with `config`'s `plan` and made-up units alone."""
    with full_precision():
        audit, scores, coins = audit_step(plan, config.audit.canaries, device, config.audit.delta)
    return Audited(plan, audit, scores, coins)


def audit_fine_tuning(inputs: Inputs, folder: Path, team: Team) -> Audited:
    """Audit of level `run`: the whole fine-tuning of `inputs` with canaries among its private pictures.

    The first rank of `team` calls this, the others `assist_audit`. For the rest see `audit_with`.
    """
    data = encoded(inputs, Events(), team)
    return audit_with(inputs.start.config, inputs.model, inputs.base, data, inputs.bound, folder, inputs.device, team)


def assist_audit(inputs: Inputs, team: Team) -> None:
    """Every other rank's part of `audit_fine_tuning`."""
    assist_with(inputs.start.config, inputs.model, encoded(inputs, Events(), team), inputs.device, team)


def audit_with(
    config: Config,
    model: Model,
    base: Mapping[str, str],
    data: PrivateData,
    bound: Mapping[str, Any],
    folder: Path,
    device: torch.device,
    team: Team = Team(),  # noqa: B008 (frozen)
    randomness: Randomness = Randomness("audit"),  # noqa: B008 (frozen)
) -> Audited:
    """Fine-tune on `data` with canaries among them, in `folder`, and audit the canaries' measurements.

    Arguments as in `finetune`; `bound` is the fine-tuning's `run_folder.binding`, and `randomness` tosses the coins.
    `folder`, with plan, ledger and checkpoints, is removed.

    Guarantee: none: the findings were computed in a run on private data, and are for the operator alone. Nothing that
    was trained with canaries outlives the call: `finetune` writes no result of it, and its folder is removed.
    """
    coins = team.once(toss(config.audit.canaries, randomness))
    canaries = Canaries.beside(len(data.latents), coins, config)
    quiet = replace(config, train=replace(config.train, grid_every=0, resume="auto"))
    try:
        # no fine-tuning has this binding, so none can continue in this folder
        with open_run_folder(folder / "run", quiet, {**bound, "canaries": len(coins)}) as run:
            audited = data.with_canaries(canaries)
            finetune(quiet, model, base, audited, run, device, Events(), _no_grid, team)
            plan = run.plan
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    with full_precision():
        worlds = spreads(plan, randomness, device)
    audit, scores = audit_of(plan, np.stack(canaries.seen), coins, worlds, config.audit.delta or plan.delta)
    return Audited(plan, audit, scores, coins)


def assist_with(config: Config, model: Model, data: PrivateData, device: torch.device, team: Team) -> None:
    """Every other rank's part of `audit_with`."""
    canaries = Canaries.beside(len(data.latents), team.once(), config)
    assist(config, model, data.with_canaries(canaries), device, team)


def _no_grid(_model: Model, _path: Path) -> None:
    """Draw nothing: these weights were trained beside canaries."""


def keep_record(audited: Audited, path: Path) -> dict[str, Any]:
    """Append an audit of level `step` to the experiment's records, which its releases name; returns the record."""
    return record_audit(path, audited.audit.as_json(), audited.plan, code_digest(), time.strftime(DATE, time.gmtime()))
