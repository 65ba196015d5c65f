"""The audits that a study makes: of each private step once at each epsilon, and as the released code would clip it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, replace
from typing import Any

from dp_lora.config import Config
from dp_lora.files import digest_value
from dp_lora.privacy.audit_record import audits_of
from dp_lora.privacy.plan import FLAT, PER_UNIT, PUBLISHED, PrivacyPlan
from dp_lora.study.grid import Grid
from dp_lora.study.place import Place
from dp_lora.study.result import AUDIT
from dp_lora.training.plan import make_plan
from dp_lora.training.resolved import Resolved

Audits = Mapping[str, Mapping[str, str]]  # stage -> settings in which it differs from its member


def as_published(config: Config) -> Config | None:
    """This experiment with each of its draws clipped apart, as in the released code; None where that has no meaning.

    One draw is clipped alike in both. The released code knows no persons, no other clipping, and no earlier release.
    """
    privacy = config.privacy
    known = (privacy.unit, privacy.clipping, privacy.accounting, privacy.parent) == ("picture", FLAT, PER_UNIT, None)
    if privacy.k == 1 or math.isinf(privacy.eps) or not known:
        return None
    return replace(config, privacy=replace(privacy, accounting=PUBLISHED))


def _step(config: Config) -> tuple[object, ...]:
    """The settings that decide a private step; an audit at a small epsilon holds for the same step at a larger one."""
    return (config.data.n_public, *astuple(replace(config.privacy, eps=1.0)))


def auditors(grid: Grid, found: Sequence[Place]) -> dict[int, Audits]:
    """Numbers of the members that audit their step for all that share it, and the audits of each."""
    first: dict[tuple[object, ...], Place] = {}
    for place in found:
        if not math.isinf(place.config.privacy.eps):
            first.setdefault(_step(place.config), place)
    return {place.number: _stages(grid, place.config) for place in first.values() if grid.audit}


def _stages(grid: Grid, config: Config) -> Audits:
    stages = {}
    for eps in grid.audit:
        at = {"privacy.eps": f"{eps:g}"}
        stages[f"{AUDIT}-eps{eps:g}"] = at
        if as_published(config):
            stages[f"{AUDIT}-eps{eps:g}-{PUBLISHED}"] = at | {"privacy.accounting": PUBLISHED}
    return stages


def records_of(starts: Iterable[Resolved], code: str) -> list[Mapping[str, Any]]:
    """The records of audits of `code` in the members' private steps, and in these as the released code clips, once."""
    found = ((start.audits, plan) for start in starts for plan in plans_of(start.config))
    records = [record for path, plan in found for record in audits_of(path, plan, code)]
    return list({digest_value(record): record for record in records}.values())


def plans_of(config: Config) -> list[PrivacyPlan]:
    """An experiment's plan, and that of the released code where it has a meaning. Raises InputError as `make_plan`."""
    return [make_plan(one) for one in (config, as_published(config)) if one is not None]
