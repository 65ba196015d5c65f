"""The one folder that may be published: adapter, privacy statement, model card.

Its content depends on private data only through the mechanism: no true count, no digest, no hash of private data.
"""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dp_lora import __version__
from dp_lora.config.schema import Config
from dp_lora.errors import InputError
from dp_lora.files import whole_folder, write_json
from dp_lora.models.adapters import WEIGHTS, Adapter, save_adapter
from dp_lora.models.folder import Model
from dp_lora.privacy.accounting import cross_checked, spent
from dp_lora.privacy.audit_record import NOT_AUDITED, public_facts
from dp_lora.privacy.composition import ReleaseCost, compose
from dp_lora.privacy.plan import PrivacyPlan
from dp_lora.privacy.published import claimed_epsilon

WEB_SCRAPED = (
    "**What the statement covers:** the private fine-tuning. The base was called public by the one who trained this; a "
    "base of pictures from the web may have seen the private pictures there."
)
RANDOMNESS_FRESH = (
    "fresh entropy of the operating system for sampling and noise; statistical generator (SFC64), not cryptographic"
)
RANDOMNESS_REPLAY = (
    "replayed from a seed file of the operator's: epsilon holds only while that file is secret; "
    "statistical generator (SFC64), not cryptographic"
)


def require_target(plan: PrivacyPlan, steps: int, shown: str) -> None:
    """InputError where `steps` steps of a private plan spend more than its target. `shown` names the plan."""
    epsilon = spent(plan, steps).epsilon
    if epsilon > plan.target_epsilon:
        raise InputError(
            f"{shown}: noise_multiplier={plan.noise_multiplier} gives epsilon {epsilon:.6g} after {steps} "
            f"steps, above the target {plan.target_epsilon:g}: nothing is trained or released so; restore the plan, or "
            "start in another folder"
        )


def privacy_statement(
    plan: PrivacyPlan,
    counted_steps: int,
    run_id: str,
    ledger_head: str,
    config: Config,
    before: Sequence[ReleaseCost] = (),
    audits: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The content of privacy.json, from public values and the ledger's count alone; `before`: releases whose cost adds.

    `audits`: audits of the private step with this code and these settings (`audit_record.audits_of`), which hold no
    private data. `run_id` and `ledger_head` say nothing of the data: the former is random, for the latter see
    `Ledger.head`. Raises InputError where the ledger holds no step, or more than the plan allows, or where epsilon
    exceeds the target.
    """
    if not plan.private:
        return {
            "private": False,
            "statement": "trained without privacy: no bound holds; keep this adapter to yourself",
            "k": plan.k,
            "sample_rate": plan.sample_rate,
            "steps": plan.steps,
            "unit": plan.unit,
            "run_id": run_id,
        }
    if counted_steps < 1:
        raise InputError("the ledger holds no step: nothing was trained privately, or the ledger is lost")
    if counted_steps > plan.steps:
        raise InputError(f"the ledger holds {counted_steps} steps, more than the {plan.steps} of its plan: no release")
    accountants = cross_checked(plan, counted_steps)
    if not plan.guaranteed:
        return _published_statement(plan, counted_steps, accountants.epsilon, run_id)
    for steps in (plan.steps, counted_steps):
        require_target(plan, steps, "the plan")
    parts = (*before, ReleaseCost(accountants.epsilon, plan.delta, run_id=run_id))
    epsilon, delta = compose(parts)
    return {
        "private": True,
        "accounting": plan.accounting,
        "statement": (
            f"({epsilon:.6g}, {delta:.6g})-differentially private, {plan.relation}, unit of privacy: one {plan.unit}"
        ),
        "epsilon": epsilon,
        "delta": delta,
        "parts": [part.as_json() for part in parts],
        "accountants": accountants.as_json(),
        "target_epsilon": plan.target_epsilon,
        "target_delta": plan.delta,
        "noise_multiplier": plan.noise_multiplier,
        "sensitivity": plan.sensitivity * plan.max_grad_norm,
        "sample_rate": plan.sample_rate,
        "steps": counted_steps,
        "max_grad_norm": plan.max_grad_norm,
        "clipping": plan.clipping,
        "k": plan.k,
        "expected_batch": plan.expected_batch,
        "n_public": config.data.n_public,
        "relation": plan.relation,
        "unit": plan.unit,
        "randomness": RANDOMNESS_REPLAY if config.privacy.reproducible else RANDOMNESS_FRESH,
        "versions": {
            "dp-lora": __version__,
            **{name: version(name) for name in ("torch", "opacus", "scipy", "diffusers", "peft", "numpy")},
        },
        "run_id": run_id,
        "ledger_head": ledger_head,
        "audits": [dict(audit) for audit in audits],
    }


def _published_statement(plan: PrivacyPlan, counted_steps: int, bounded: float, run_id: str) -> dict[str, Any]:
    """No key here is called epsilon: neither number is a promise."""
    claimed = claimed_epsilon(plan, counted_steps)
    return {
        "private": False,
        "accounting": plan.accounting,
        "statement": (
            f"no guarantee, for comparison only: each of the k={plan.k} draws of a picture was clipped apart, as in "
            f"the code released with the paper, which claims epsilon {claimed:.4g}; the noise bounds epsilon by "
            f"{bounded:.4g} (delta {plan.delta:g}); keep this adapter to yourself"
        ),
        "claimed_epsilon": claimed,
        "bounded_epsilon": bounded,
        "delta": plan.delta,
        "sensitivity": plan.sensitivity * plan.max_grad_norm,
        "noise_multiplier": plan.noise_multiplier,
        "sample_rate": plan.sample_rate,
        "steps": counted_steps,
        "max_grad_norm": plan.max_grad_norm,
        "k": plan.k,
        "unit": plan.unit,
        "run_id": run_id,
    }


def write_result(
    folder: Path,
    plan: PrivacyPlan,
    counted_steps: int,
    run_id: str,
    ledger_head: str,
    config: Config,
    adapter: Adapter,
    before: Sequence[ReleaseCost],
    base: Mapping[str, str],
    audits: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write the adapter's folder, whole or not at all; `base` names the base model, the rest is `privacy_statement`'s.

    A release follows the umask; without a guarantee the folder is its owner's alone. Raises InputError, before anything
    is written, where `privacy_statement` does.
    """
    statement = privacy_statement(plan, counted_steps, run_id, ledger_head, config, before, audits)
    with whole_folder(folder, private=not statement["private"]) as temporary:
        trained_on = {"source": config.data.source, "unit": config.privacy.unit, "n_public": config.data.n_public}
        status = "private-dp" if statement["private"] else "non-private"
        save_adapter(temporary, adapter, config.data.classes, base, trained_on, status)
        write_json(temporary / "privacy.json", statement)
        (temporary / "README.md").write_text(_card(config, statement, base, adapter), encoding="utf-8")


def _card(config: Config, statement: Mapping[str, Any], base: Mapping[str, str], adapter: Adapter) -> str:
    title = f"DP-LoRA adapter: {config.experiment.name}"
    lines = [*front_matter("peft", "lora, diffusers, differential-privacy", base), f"# {title}", ""]
    lines += [config.experiment.description, "", f"**Privacy:** {statement['statement']}.", ""]
    if statement["private"]:
        lines += [
            f"- noise_multiplier {statement['noise_multiplier']:.6g}, sample_rate {statement['sample_rate']:.6g}, "
            f"{statement['steps']} steps, max_grad_norm {statement['max_grad_norm']:g} ({statement['clipping']} "
            f"clipping), k {statement['k']}",
            _accountants_line(statement["accountants"]),
            f"- Randomness: {statement['randomness']}.",
            *_scope_lines(statement["parts"]),
            *audit_lines(statement["audits"]),
            "",
        ]
    rank = f"{config.lora.rank}"
    if config.lora.rank_last is not None:
        rank += f" to {config.lora.rank_last} ({config.lora.rank_schedule} in depth)"
    lines += [
        f"**Base model:** `{base['path']}` (SHA-256 of the folder {base['digest']}).",
        *([] if adapter.embedding is None else [_classes_line(config)]),
        f"**LoRA:** rank {rank}, targets {config.lora.targets}, trained factors {config.lora.train}.",
        *([WEB_SCRAPED] if adapter.family.pipeline else []),
        "",
        "Load it, in this folder:",
        "",
        *loading_lines(adapter, base),
        "",
    ]
    return "\n".join(lines)


def _classes_line(config: Config) -> str:
    return f"**Classes, in the order of class_embedding.safetensors:** {', '.join(config.data.classes)}."


def _accountants_line(found: Mapping[str, float | None]) -> str:
    line = f"- This run's epsilon: {found['epsilon']:.6g}, an upper bound (privacy loss distribution, PLD). Beside it: "
    if found["prv"] is not None:
        line += f"PRV, between {found['prv_lower']:.6g} and {found['prv']:.6g}, and "
    return f"{line}RDP, at most {found['rdp']:.6g}."


def _scope_lines(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    if len(parts) == 1:
        return ["- Holds for this run alone: several runs on the same data add up."]
    return [
        f"- Holds for publishing these {len(parts)} together: the sum of their epsilons and of their deltas. Whatever "
        "else is made from the same data adds up.",
        *(f"  - {ReleaseCost(**part)}" for part in parts[:-1]),
        f"  - this run: epsilon {parts[-1]['epsilon']:.6g}, delta {parts[-1]['delta']:.6g}",
    ]


def audit_lines(audits: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a model card: each audit of this code and these settings, or that there was none."""
    if not audits:
        return [f"- Private step: {NOT_AUDITED} with this code and these settings."]
    return [
        f"- Audit of {audit['date']} at epsilon {audit['target_epsilon']:g}, delta {audit['delta']:g} (code "
        f"{audit['code'][:12]}, {audit['canaries']} canaries, {100 * audit['confidence']:g}%): "
        f"{'REFUTED' if audit['refuted'] else 'not refuted'}; {public_facts(audit)}."
        for audit in audits
    ]


def loading_lines(adapter: Adapter | Model, base: Mapping[str, str], folder: str = ".") -> list[str]:
    """Lines of a model card: Python that loads the base and the adapter in `folder` onto it; to be run at the card.

    `base` is as model.json names it, and `adapter` has the base's denoiser and family.
    """
    family, kind = adapter.family, type(adapter.denoiser)
    name = json.dumps(base.get("hub", base["path"]))
    # a base that lies on this machine is named without the folders above it: whoever has the release has another path
    where = "" if "hub" in base else "  # the path of the base model's folder, on your machine"
    revision = f', revision="{base["revision"]}"' if "revision" in base else ""
    if not family.pipeline:
        module = "diffusers" if kind.__module__.startswith("diffusers.") else kind.__module__
        imports = [f"from {module} import {kind.__name__}"]
        lines = [
            f'unet = {kind.__name__}.from_pretrained(base, subfolder="unet")',
            f'unet.load_lora_adapter(folder, weight_name="{WEIGHTS}", prefix=None)',
        ]
    else:
        imports = ["from diffusers import DiffusionPipeline"]
        lines = [f"pipe = DiffusionPipeline.from_pretrained(base{revision})"]
        if family.by_pipeline:
            lines.append("pipe.load_lora_weights(folder)")
        else:
            imports.append("from peft import PeftModel")
            part = f"pipe.{family.part}"
            lines += [*family.loading, f'{part} = PeftModel.from_pretrained({part}, folder + "/peft")']
    return ["```python", *imports, "", f"base = {name}{where}", f'folder = "{folder}"', *lines, "```"]


def front_matter(library: str, tags: str, base: Mapping[str, str]) -> list[str]:
    """The head of a model card, which the Hub reads; it links the card to a base on the Hub."""
    return [
        "---",
        f"library_name: {library}",
        f"tags: [{tags}]",
        *([f"base_model: {base['hub']}"] if "hub" in base else []),
        "---",
    ]
