"""Resolve a fine-tuning's inputs and working folder once, and refuse bad settings before any work."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dp_lora import tracking
from dp_lora.cli.adapters import find_adapter
from dp_lora.cli.common import Call, relative
from dp_lora.cli.pipelines import RUNS, base_to_read, is_made_here, private_data
from dp_lora.cli.prepared import caches
from dp_lora.cli.record import LEDGER, operator_folder
from dp_lora.config import PROJECT, ROOT, Config
from dp_lora.errors import InputError
from dp_lora.files import digest_value, read_json
from dp_lora.models.info import load_info
from dp_lora.privacy.audit_record import settings_digest
from dp_lora.privacy.composition import ReleaseCost, parent_parts
from dp_lora.statement import read_privacy

if TYPE_CHECKING:
    from dp_lora.privacy.plan import PrivacyPlan
    from dp_lora.training.resolved import Resolved

MADE_OF = ("public", "autoencoder", "ldm")  # config sections that the model.json of our own base states
KEPT = "runs/DIGEST (ledger and checkpoints)"  # a dry run's name for the working folder


def audits_path(config: Config) -> Path:
    """The file that records the audits of an experiment's private step."""
    return RUNS / "audits" / f"{config.experiment.name}.jsonl"


def audited_plan(config: Config) -> "PrivacyPlan":
    """The plan whose steps an audit attacks: the experiment's fine-tuning plan."""
    from dp_lora.training.plan import make_plan

    return make_plan(config)


def audited_as(start: "Resolved", bound: Mapping[str, Any]) -> str:
    """The tag `audit_of` of runs that audited the private step with this fine-tuning's code and settings."""
    return settings_digest(start.plan, bound["code"])


def resolve(config: Config, *, remade: bool = False, dry_run: bool = False) -> "Resolved":
    """Resolve base, plan, parent, pictures and the folder that train.resume names; check a base that exists.

    With `remade` the caller brings the base up to date before its use: a base made with other settings counts as
    missing. A `dry_run` takes an outline of a Hub base that is not here yet. Raises InputError for bad LoRA targets, a
    bad seed file and every setting that would otherwise be refused after the work upstream.
    """
    # imported late: scipy, and torch and diffusers where the base does not exist yet
    from dp_lora.models.shapes import base_shapes
    from dp_lora.models.targets import matched_modules
    from dp_lora.training.plan import make_plan
    from dp_lora.training.resolved import Resolved, check_base

    base = base_to_read(config, dry_run=dry_run)
    # a release must not name a folder of this machine
    shown = relative(base) if base.resolve().is_relative_to(ROOT) else base.name
    if remade and base.exists() and is_made_here(config) and not _made_with(config, base):
        base = base / "to be made"
    shapes = base_shapes(config, base)
    matched_modules(shapes.denoiser, config.lora.targets, shapes.family)
    if config.privacy.seed_file:
        from dp_lora.privacy.randomness import read_secret  # torch

        read_secret(Path(config.privacy.seed_file))
    resumed, plan = _named_by_resume(config), make_plan(config)
    latents = caches(config) / "latents"
    parent, audits = _parent(config, plan), audits_path(config)
    start = Resolved(config, base, shapes, shown, private_data(config), latents, plan, parent, audits, resumed)
    if base.exists():
        check_base(start)
    return start


def _made_with(config: Config, base: Path) -> bool:
    """Whether a stage made this base with the config's own sections."""
    stated = load_info(base)["config"]
    known = [name for name in MADE_OF if stated.get(name) is not None]
    return all(digest_value(stated[name]) == digest_value(asdict(getattr(config, name))) for name in known)


def _named_by_resume(config: Config) -> Path | None:
    """The working folder of the run that train.resume names; None for auto and never."""
    if config.train.resume in ("auto", "never"):
        return None
    shown = f"train.resume={config.train.resume}"
    name = tracking.find_run(config.train.resume, "train.resume")["tags"].get("mlflow.runName", "")
    kept = operator_folder(config.train.resume) / LEDGER
    if not kept.exists():
        raise InputError(f"{shown}: that run ({name}) has no ledger on this machine; name a finetune run made here")
    working = PROJECT / read_json(kept)["folder"]
    if not (working / "plan.json").exists():
        raise InputError(
            f"{shown}: its working folder was not begun, or is gone: {relative(working)}",
            f"{shown}: its working folder was not begun",
        )
    return working


def _parent(config: Config, plan: "PrivacyPlan") -> tuple[ReleaseCost, ...]:
    """The privacy cost of the fine-tuning that privacy.parent names, its own parents included; empty for null."""
    if config.privacy.parent is None:
        return ()
    statement = read_privacy(find_adapter(config.privacy.parent, "privacy.parent"))
    return parent_parts(statement, plan, f"privacy.parent={config.privacy.parent}")


def working_folder(call: Call, start: "Resolved", folder: Path, bound: dict[str, Any]) -> Path:
    """The folder of plan, ledger and checkpoints; not a stage's output, which DVC deletes before the stage runs again.

    A direct call typed again finds the same folder and goes on. All calls of a replay share one ledger, so that the
    same noise is never added to two sums. A run that `mlflow run` made has its own folder; train.resume names it.
    """
    from dp_lora.training.run_folder import keyed_folder

    config = start.config
    shared = call.child or not call.joined or config.privacy.reproducible
    working = keyed_folder(RUNS, bound) if shared else folder
    if start.resumed is None:
        return working
    if config.privacy.reproducible and start.resumed.resolve() != working.resolve():
        raise InputError(f"train.resume={config.train.resume}: not this plan's; a replay has one working folder")
    return start.resumed
