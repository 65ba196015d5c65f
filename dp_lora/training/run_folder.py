"""The working folder of one private fine-tuning: plan.json, ledger.jsonl, checkpoints/, and its result.

It lies outside every output that DVC may delete. A folder belongs to one plan, one config and one private dataset.
Beside it, .heads/ records the growth of its ledger in this place.
"""

import math
import platform
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dp_lora.config.schema import Config
from dp_lora.errors import InputError
from dp_lora.files import digest_value, exclusive, fsync, read_json, write_json
from dp_lora.models.device import pick_precision
from dp_lora.operator_key import keyed_digest
from dp_lora.privacy.accounting import spent
from dp_lora.privacy.composition import ReleaseCost
from dp_lora.privacy.heads import FOLDER, Heads
from dp_lora.privacy.ledger import ONE_BRANCH, Ledger
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.release import require_target
from dp_lora.training.plan import make_plan
from dp_lora.training.step_code import code_digest

RELEASE = "release"  # the one folder that may be published
NOT_PRIVATE = "not-private"
SAME_NOISE = 0.01  # relative
CPUINFO = Path("/proc/cpuinfo")
CPU_FIELDS = ("model name", "flags", "CPU implementer", "CPU part", "Features")  # of x86-64 and of ARM


def binding(
    config: Config, data_digest: str, base_digest: str, device: str, parent: Sequence[ReleaseCost] = ()
) -> dict[str, Any]:
    """All settings of a fine-tuning, and its data: a resumed run must have the same as its start.

    `parent`: costs of privacy.parent; a path and a run id of one parent give the same.
    """
    sections: dict[str, Any] = {name: asdict(getattr(config, name)) for name in ("lora", "privacy", "train")}
    del sections["train"]["resume"]  # decides how the run begins, not its result
    del sections["privacy"]["parent"]
    data = config.data
    sections["data"] = {"classes": list(data.classes), "n_public": data.n_public}
    if data.prompt is not None or data.prompts is not None:
        sections["data"] |= {"prompt": data.prompt, "prompts": list(data.prompts or [])}
    sections["seed"] = config.experiment.seed
    if config.privacy.reproducible:
        # an exact replay needs the same rounding: two sums under one noise would reveal their difference
        sections["physical_batch_size"] = config.compute.physical_batch_size
        sections["ranks"] = config.compute.devices * config.compute.num_nodes
        sections["precision"] = str(pick_precision(config.compute.precision, torch.device(device)))
        sections["machine"] = {"device": device, "threads": torch.get_num_threads(), "cpu": processor()}
        sections["versions"] = {name: version(name) for name in ("torch", "numpy", "diffusers", "peft")}
    # JSON has no infinity
    return {
        "config": _finite(sections),
        "data": data_digest,
        "base": base_digest,
        "parent": [part.as_json() for part in parent],
        "code": code_digest(),
    }


def processor() -> str:
    """Digest of model and instruction sets of this machine's CPUs: they decide the kernels, and so the rounding.

    Python's own platform.processor() is empty on most Linux systems.
    """
    if not CPUINFO.exists():
        return platform.processor()
    fields = (line.partition(":") for line in CPUINFO.read_text(encoding="utf-8").splitlines())
    return digest_value(sorted({f"{name.strip()}:{value}" for name, _, value in fields if name.strip() in CPU_FIELDS}))


def hardware(device: torch.device) -> str:
    """The hardware that decides the kernels on `device`: a GPU's name, or the CPU's model and instruction sets."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return "inf" if value == float("inf") else value


def binding_digest(bound: dict[str, Any]) -> str:
    """Key of the random streams of the reproducible mode: one digest, one run. Depends on private data."""
    return digest_value(bound)


def keyed_folder(runs: Path, bound: dict[str, Any]) -> Path:
    """Working folder of a fine-tuning without a run of its own.

    Its name is keyed by a secret of this place (runs/.key), since a bare digest would tell who is in the data.
    """
    return runs / keyed_digest(runs, bound)[:16]


@dataclass(frozen=True)
class RunFolder:
    folder: Path
    plan: PrivacyPlan
    bound: dict[str, Any]
    run_id: str  # random, says nothing about the data
    physical_batch_size: int | None  # rows at a time that were chosen for this folder; None: not chosen yet

    @property
    def heads(self) -> Heads:
        return _heads(self.folder, self.bound, self.run_id)

    @cached_property
    def ledger(self) -> Ledger:
        return Ledger(self.folder / "ledger.jsonl", self.heads)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def result(self) -> Path:
        """The adapter's folder: release/ where the plan's epsilon holds, else not-private/."""
        return self.folder / (RELEASE if self.plan.guaranteed else NOT_PRIVATE)

    def keep_physical_batch_size(self, rows: int) -> None:
        """Write beside the plan how many rows at a time were found to fit, so that a resumed run uses the same."""
        path = self.folder / "plan.json"
        write_json(path, {**read_json(path), "physical_batch_size": rows})


@contextmanager
def open_run_folder(folder: Path, config: Config, bound: dict[str, Any]) -> Iterator[RunFolder]:
    """Begin or continue in `folder`, alone: a second writer, another config or other data are InputErrors.

    So are a copy of a folder in use, an older copy of one that continued here, and a plan that exceeds its target. With
    train.resume=never a folder that holds steps is an InputError too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fsync(folder.parent)
    with _alone(folder / "lock", f"{folder}: another process is writing there"):
        fsync(folder)  # for a ledger whose process ended between making it and this call
        run = _begin(folder, config, bound)
        run.heads.make()
        with _alone(run.heads.path, f"{folder}: another process is writing to a copy of it"):
            _check_ledger(run, config)
            yield run


@contextmanager
def _alone(lock: Path, otherwise: str) -> Iterator[None]:
    with ExitStack() as held:
        try:
            held.enter_context(exclusive(lock))
        except BlockingIOError:
            raise InputError(f"{otherwise}; wait for it, or stop it") from None
        yield


def _heads(folder: Path, bound: Mapping[str, Any], run_id: str) -> Heads:
    """Heads that this place has seen of the ledger of `folder`, or of any copy of it.

    With fresh randomness the file is named by the run's random id, which a copy has too; another run in a folder of
    that name spends on its own account. All replays of one binding, whichever run, have one noise: their file has the
    folder's name, which is the keyed digest of the binding, so that a replay does not begin anew where the whole folder
    was lost, and with it the sums that its noise was added to.
    """
    replay = bound.get("config", {}).get("privacy", {}).get("reproducible", False)
    return Heads(folder.parent / FOLDER / (folder.name if replay else run_id))


def _begin(folder: Path, config: Config, bound: dict[str, Any]) -> RunFolder:
    """The folder with its plan, or a new plan; InputError, before any step, where the configuration gives another."""
    path = folder / "plan.json"
    if not path.exists():
        if any((folder / name).exists() for name in ("ledger.jsonl", "checkpoints", RELEASE, NOT_PRIVATE)):
            raise InputError(f"{folder}: was begun and has no plan.json; restore it, or start in another folder")
        run_id = uuid.uuid4().hex
        if _heads(folder, bound, run_id).last().lines:
            raise InputError(f"{folder}: steps of this replay were taken here, and their ledger is gone; {ONE_BRANCH}")
        write_json(path, {"plan": make_plan(config).as_json(), "bound": bound, "run_id": run_id})
    content, plan = _read_plan(path)
    if content["bound"] != bound:
        changed = sorted(_changed(content["bound"], bound))
        raise InputError(f"{folder}: was begun with other {', '.join(changed)}; a ledger holds one plan on one dataset")
    if changed := _changed_plan(plan, make_plan(config)):
        raise InputError(f"{path}: its plan has another {', '.join(changed)} than its configuration gives; restore it")
    if plan.guaranteed:
        require_target(plan, plan.steps, str(path))
    return RunFolder(folder, plan, bound, content["run_id"], content.get("physical_batch_size"))


def _check_ledger(run: RunFolder, config: Config) -> None:
    """InputError for a ledger that is lost, older than its last head here, or barred by train.resume=never."""
    folder, steps = run.folder, run.ledger.counted_steps(run.plan)
    if (run.checkpoints.exists() or run.result.exists()) and not run.ledger.path.exists():
        raise InputError(f"{folder}: was begun and has no ledger.jsonl; restore it, or start in another folder")
    if config.train.resume == "never" and steps:
        raise InputError(
            f"train.resume=never: {folder} holds {steps} steps of this fine-tuning; set train.resume=auto to go on "
            "there, or change the plan to begin another"
        )


def _changed_plan(kept: PrivacyPlan, made: PrivacyPlan) -> list[str]:
    """Names of the fields in which the stored plan differs from the current one.

    Another version of the accountants may find slightly different noise; less noise must still keep to the target.
    """
    if math.isclose(kept.noise_multiplier, made.noise_multiplier, rel_tol=SAME_NOISE):
        made = replace(made, noise_multiplier=kept.noise_multiplier)
    return [field.name for field in fields(made) if getattr(kept, field.name) != getattr(made, field.name)]


def _changed(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key in old.keys() | new.keys():
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _changed(before, after, f"{prefix}{key}." if prefix or key != "config" else "")
        elif before != after:
            yield f"{prefix}{key}"


def of_other_data(runs: Path, parent: Sequence[ReleaseCost], data_digest: str) -> list[str]:
    """Run folders below `runs` of the parent's parts whose private data were not exactly the same.

    Their cost is added all the same: most people may be in both, and a sum of more parts is a bound too.
    """
    named = {part.run_id for part in parent}
    plans = [(path.parent, _read_plan(path)[0]) for path in sorted(runs.glob("*/plan.json"))]
    return [str(f) for f, content in plans if content["run_id"] in named and content["bound"]["data"] != data_digest]


def other_ledgers(runs: Path, own: Path, data_digest: str, parent: Sequence[ReleaseCost] = ()) -> list[str]:
    """One line for each other run folder below `runs` that spent privacy of the same private data.

    Folders that `parent` counts already are left out.
    """
    lines = []
    named = {part.run_id for part in parent}
    for path in sorted(runs.glob("*/plan.json")):
        if path.parent.resolve() == own.resolve():
            continue
        content, plan = _read_plan(path)
        if content["bound"]["data"] != data_digest or content["run_id"] in named:
            continue
        ledger = Ledger(path.parent / "ledger.jsonl", _heads(path.parent, content["bound"], content["run_id"]))
        if not plan.private and (path.parent / "checkpoints").exists():
            lines.append(f"{path.parent}: without privacy")
        elif plan.private:
            try:
                steps = ledger.counted_steps(plan)
            except InputError as error:
                lines.append(f"{path.parent}: nobody knows how much ({error})")
                continue
            if steps:
                lines.append(f"{path.parent}: epsilon {spent(plan, steps).epsilon:.3f} at delta {plan.delta:g}")
    return lines


def _read_plan(path: Path) -> tuple[dict[str, Any], PrivacyPlan]:
    """plan.json as it stands, and the plan in it."""
    try:
        content = read_json(path)
        plan = PrivacyPlan.from_json(content["plan"])
        if not isinstance(content["bound"]["data"], str) or not re.fullmatch("[0-9a-f]{32}", content["run_id"]):
            raise ValueError("no digest of data, or no run id")
        rows = content.get("physical_batch_size", 1)
        if not isinstance(rows, int) or rows < 1:
            raise ValueError(f"physical_batch_size={rows!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        line = " ".join(str(error).split())
        raise InputError(f"{path}: cannot be read ({line}); restore it, or move its folder away") from None
    return content, plan
