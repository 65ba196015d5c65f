"""Audit records that a release may publish: the audits of its code and settings, their dates and their results.

Claim: a record depends on no private data. Proof: only audits of level `step` are recorded, and they read none; a
release picks its records by code and public settings, both public. Whether and when to audit is the operator's choice,
like every setting.

Each experiment has one file of records, one JSON line per audit. Lines are only ever appended, so that a later audit
that did not refute the claim cannot replace an earlier one that did.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dp_lora.errors import InputError
from dp_lora.files import append_line, digest_value, private_folder
from dp_lora.privacy.plan import PrivacyPlan

# fields in which plans may differ: audits of one code at small epsilons count at larger ones, where none can refute
NOT_COMPARED = ("target_epsilon", "noise_multiplier", "delta")
NOT_AUDITED = "not audited"
DIRECT_NUMBERS = ("noise", "lag", "jump", "divisor")


def settings_digest(plan: PrivacyPlan, code: str) -> str:
    """SHA-256 of the code's digest and of the plan without epsilon, noise and delta.

    Guarantee: made of public values.
    """
    return digest_value([code, {name: value for name, value in plan.as_json().items() if name not in NOT_COMPARED}])


def record_audit(path: Path, audit: Mapping[str, Any], plan: PrivacyPlan, code: str, date: str) -> dict[str, Any]:
    """Append an audit's JSON (`Audit.as_json`) to `path`; `code` is the audited code's digest. Returns the record.

    Guarantee: earlier records stay.
    """
    record = {
        "date": date,
        "code": code,
        "settings": settings_digest(plan, code),
        "target_epsilon": plan.target_epsilon,
        "noise_multiplier": plan.noise_multiplier,
        **audit,
    }
    private_folder(path.parent)
    append_line(path, json.dumps(record, sort_keys=True))
    return record


def audits_of(path: Path, plan: PrivacyPlan, code: str) -> list[dict[str, Any]]:
    """The records in `path` for this code and the plan's settings, oldest first; none without a file.

    A line that was torn in a crash is skipped. InputError for a file that cannot be read.

    Guarantee: the claim at the head of this file.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError):
        raise InputError(
            f"{path}: cannot be read; restore it, or remove it: the release then says {NOT_AUDITED}"
        ) from None
    wanted, found = settings_digest(plan, code), []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("settings") == wanted:
            found.append(record)
    return found


def public_facts(record: Mapping[str, Any]) -> str:
    """Bound, claim, ceiling and direct numbers of a record, in one line for people.

    Guarantee: none beyond the record's.
    """
    direct = (f"{name} {record[name]['value']:.3f} ± {record[name]['half']:.3f}" for name in DIRECT_NUMBERS)
    return (
        f"epsilon at least {record['bound']['epsilon']:.3g} of the claimed {record['claimed']:.4g} (perfect guesses "
        f"would give {record['ceiling']:.3g}); {', '.join(direct)}"
    )
