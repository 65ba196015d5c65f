"""Audits of an experiment: of the private step with its plan, or of all of its fine-tuning."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dp_lora.config.schema import Config
from dp_lora.models.device import full_precision
from dp_lora.privacy.audit import Audit, audit_step
from dp_lora.privacy.audit_record import record_audit
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.training.plan import make_plan
from dp_lora.training.run_folder import code_digest

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


def keep_record(audited: Audited, path: Path) -> dict[str, Any]:
    """Append an audit of level `step` to the experiment's records, which its releases name; gives the record."""
    return record_audit(path, audited.audit.as_json(), audited.plan, code_digest(), time.strftime(DATE, time.gmtime()))
