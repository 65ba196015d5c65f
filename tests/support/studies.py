"""Studies with made-up outcomes, in files as the stages write them, for tests of the report."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dp_lora.config import Config, load
from dp_lora.evaluation.measurement import Measurement
from dp_lora.evaluation.report import EvaluationResult, write_result
from dp_lora.files import digest_value, write_json
from dp_lora.grids import write_grid
from dp_lora.privacy.audit import Audit
from dp_lora.privacy.audit_bound import Bound
from dp_lora.privacy.audit_record import record_audit
from dp_lora.privacy.audit_scores import Measured
from dp_lora.release import privacy_statement
from dp_lora.study.result import DONE, FAILED, WAITING, Member, Outcome, Study
from dp_lora.tracking.links import local_ui
from dp_lora.training.plan import make_plan
from dp_lora.training.result import leave_result

DIGITS = [str(i) for i in range(10)]
ACCURACY = {1.0: 0.867, 10.0: 0.906, math.inf: 0.925}
FEW_STEPS = {"privacy.epochs": "1"}  # ten steps, so that computing an epsilon takes milliseconds
REASON = "compute.physical_batch_size=4: a person has <8> rows & more; raise it"


def configured(config: str, settings: Mapping[str, str]) -> Config:
    return load(config, {}, " ".join(f"{key}={value}" for key, value in settings.items()))


def member(group: str, settings: Mapping[str, str], seed: int, config: str = "mnist5k") -> Member:
    shown = " ".join(f"{key.removeprefix('privacy.')}={value}" for key, value in settings.items())
    return Member(f"{shown} seed={seed}", config, {**FEW_STEPS, **settings}, seed, group)


def _finetuned(folder: Path, config: Config) -> None:
    """Write the files of `finetune` without the weights: plan, statement and curves."""
    plan = make_plan(config)
    result = folder / ("release" if plan.guaranteed else "not-private")
    result.mkdir(parents=True)
    write_json(folder / "plan.json", {"plan": plan.as_json()})
    write_json(result / "privacy.json", privacy_statement(plan, plan.steps, "0" * 32, "head", config))
    leave_result(result, folder)


def _drawn(folder: Path, classes: Sequence[str], seed: int) -> None:
    """Write the files of `sample` without the dataset: a grid and samples.json."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(0, 255, 16, dtype=np.uint8)[:, None, None]
    rows = [np.broadcast_to(ramp // 2 + random.integers(0, 128, (4, 1, 1, 3)), (4, 16, 16, 3)) for _ in classes]
    folder.mkdir(parents=True)
    write_grid(folder / "grid.png", [row.astype(np.uint8) for row in rows], list(classes))
    write_json(folder / "samples.json", {"n": 1000, "classes": list(classes), "seed": seed})


def digits_metrics(accuracy: float, random: np.random.Generator) -> dict[str, float]:
    """Made-up values of all scores that `fid` gives for the default experiment."""
    return {
        "samples": 1000.0,
        "accuracy": accuracy,
        "accuracy_train_on_real": 0.984,
        "accuracy_public_only": 0.799,
        "accuracy_untrained_embedding": 0.096,
        "class_agreement": accuracy - 0.04 + random.normal(0, 0.01),
        "letter_frechet_distance": 70 + 200 * (0.93 - accuracy) + random.normal(0, 4),
        "reconstruction_letter_frechet_distance": 10.37,
        "precision": accuracy - 0.2 + random.normal(0, 0.01),
        "recall": accuracy - 0.3 + random.normal(0, 0.01),
    }


def done(
    folder: Path, one: Member, metrics: Mapping[str, float], classes: Sequence[str] = DIGITS, **facts: Any
) -> Outcome:
    """A member that has finished all stages."""
    config = configured(one.config, {**one.settings, "experiment.seed": str(one.seed)})
    _finetuned(folder / "finetune", config)
    _drawn(folder / "samples", classes, one.seed)
    found = [Measurement(name, value, "made up", True, value - 0.01, value + 0.01) for name, value in metrics.items()]
    write_result(EvaluationResult(found, folder / "evaluation"))
    given = {
        "runs": {stage: digest_value([one.name, stage])[:32] for stage in ("finetune", "sample", "fid")},
        "seconds": {"finetune": 95.0 + one.seed, "sample": 31.0, "fid": 24.5},
        "peak_memory": 1.9,
        "device": "cpu, 2 threads",
    }
    return Outcome(one, DONE, folder, **{**given, **facts})


def audit_lines(path: Path, settings: Mapping[str, str], found: Mapping[float, float]) -> list[dict[str, Any]]:
    """Audit records of the default experiment's step with these settings; `found`: target epsilon -> lower bound."""
    fine = Measured(1.0, 0.01, 1.0)
    for eps, bound in found.items():
        plan = make_plan(configured("mnist5k", {**FEW_STEPS, **settings, "privacy.eps": f"{eps:g}"}))
        made = Audit(1000, 1e-5, eps, Bound(bound), 4.47, fine, Measured(0.0, 0.01, 0.0), fine, fine, 0.0, 1.0)
        record_audit(path, made.as_json(), plan, "c" * 64, "2026-01-01")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def digits_study(folder: Path, *, seeds: int = 3) -> Study:
    """Every epsilon with every seed; one seed each for other k, ranks and targets; one failed member, one waiting."""
    random = np.random.default_rng(0)
    outcomes: list[Outcome] = []

    def add(one: Member, accuracy: float) -> None:
        metrics = digits_metrics(accuracy + random.normal(0, 0.012), random)
        outcomes.append(done(folder / f"member-{len(outcomes)}", one, metrics))

    for eps, accuracy in ACCURACY.items():
        for seed in range(seeds):
            add(member("epsilon", {"privacy.eps": f"{eps:g}"}, seed), accuracy)
    add(member("k", {"privacy.eps": "10", "privacy.k": "4"}, 0), 0.91)
    for rank in ("2", "8"):
        add(member("rank", {"privacy.eps": "10", "lora.rank": rank}, 0), 0.9)
    for targets in ("study", "attn1.to_q,attn2.to_v"):
        add(member("targets", {"privacy.eps": "10", "lora.targets": targets}, 0), 0.88)
    failed = member("k", {"privacy.eps": "10", "privacy.k": "8"}, 0)
    outcomes.append(Outcome(failed, FAILED, folder / "failed", REASON, runs={"finetune": "f" * 32}))
    outcomes.append(Outcome(member("k", {"privacy.eps": "10", "privacy.k": "12"}, 0), WAITING, folder / "waits"))
    return Study(
        "mnist5k",
        "Epsilon, k, rank & targets on <MNIST>",
        tuple(outcomes),
        epsilon_of_all=None,
        delta_of_all=None,
        audits=tuple(audit_lines(folder / "audits.jsonl", {}, {1.0: 0.05})),
        ui=local_ui(),
        experiment_id="7",
    )
