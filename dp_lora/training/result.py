"""Files beside an adapter: curves of epsilon, and the figures that DVC compares."""

import shutil
from pathlib import Path

from dp_lora.files import read_json, whole_file, whole_folder, write_json
from dp_lora.privacy.accounting import epsilon_of_delta, spent
from dp_lora.privacy.composition import ReleaseCost, compose
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.statement import EPSILONS
from dp_lora.training.steps import curve_steps

EPSILON_OF_DELTA = "epsilon_of_delta.csv"
FIGURES = ("epsilon", *EPSILONS, "delta", "noise_multiplier", "sample_rate", "steps", "max_grad_norm", "k")


def leave_result(result: Path, out: Path) -> Path:
    """Leave an adapter's folder in `out`, with its curves beside it; returns the adapter's folder there.

    Where it was trained elsewhere, `out` gets a copy and metrics.json, whole or not at all.
    """
    if result.parent == out:
        _write_curves(result, out)
        return result
    statement = read_json(result / "privacy.json")
    with whole_folder(out, private=not statement["private"]) as temporary:
        shutil.copytree(result, temporary / result.name)
        write_json(temporary / "metrics.json", {name: statement[name] for name in FIGURES if name in statement})
        _write_curves(result, temporary)
    return out / result.name


def _write_curves(result: Path, folder: Path) -> None:
    for name, curve in curves(result).items():
        with whole_file(folder / name) as temporary:
            temporary.write_text(curve, encoding="utf-8")


def curves(result: Path) -> dict[str, str]:
    """CSV files of epsilon over the plan's steps, and over delta after the steps that were counted.

    Every point includes the earlier costs, as the statement does.

    Computed from public numbers; without a guarantee only the headers.
    """
    plan = PrivacyPlan.from_json(read_json(result.parent / "plan.json")["plan"])
    over_steps, over_delta = ["step,epsilon"], ["delta,epsilon"]
    if plan.guaranteed:
        statement = read_json(result / "privacy.json")
        epsilon_before, delta_before = compose(ReleaseCost(**part) for part in statement["parts"][:-1])
        over_steps += [f"{step},{epsilon_before + spent(plan, step).epsilon:.6g}" for step in curve_steps(plan.steps)]
        own = epsilon_of_delta(plan, statement["steps"])
        over_delta += [f"{delta_before + delta!r},{epsilon_before + epsilon!r}" for delta, epsilon in own]
    return {"epsilon.csv": "\n".join(over_steps) + "\n", EPSILON_OF_DELTA: "\n".join(over_delta) + "\n"}
