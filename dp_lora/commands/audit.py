"""Attack the private step of an experiment, and say whether that refutes the claimed epsilon."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dp_lora.cli.common import Call, entry_point, relative
from dp_lora.cli.early import refuse
from dp_lora.cli.finetuning import audited_as, audited_plan, audits_path, resolve
from dp_lora.cli.pipeline import absent
from dp_lora.cli.pipelines import WORKING
from dp_lora.errors import InputError, private_names
from dp_lora.files import private_folder, whole_folder, write_json
from dp_lora.tracking import TrackedRun
from dp_lora.tracking.provenance import run_name

if TYPE_CHECKING:
    from dp_lora.training.audit import Audited

AUDIT_STOPPED = "the audit of the whole fine-tuning stopped; the operator's terminal says why"


@entry_point("audit")
def main(call: Call) -> None:
    """Attack the private step with canaries: what that refutes of epsilon. Nothing of it is released."""
    from dp_lora.training.dry_run_facts import audit_facts

    config = call.config
    facts = audit_facts(config, audited_plan(config))  # before a run is opened, refuse a plan that claims nothing
    if call.dry_run:
        kept = [relative(audits_path(config))] if config.audit.level == "step" else []
        call.print_dry_run(facts, [*kept, call.shown_out("audit")])
    elif config.audit.level == "step":
        _audit_step(call)
    else:
        _audit_run(call)


def _audit_step(call: Call) -> None:
    """Audit the private step alone, with made-up units: a public result, recorded for the experiment's releases."""
    from dp_lora.models.device import pick_device
    from dp_lora.training.audit import audit_private_step, keep_record

    device = pick_device(call.config.compute.device)
    with call.tracked() as (run, folder):
        audited = audit_private_step(call.config, audited_plan(call.config), device)
        record = keep_record(audited, audits_path(call.config))
        run.tags({"audit_of": record["settings"], "code": record["code"]})
        _report(call, run, folder / "audit", audited, private=False)


def _audit_run(call: Call) -> None:
    """Audit the whole fine-tuning, with canaries among the private pictures: a result for the operator alone."""
    refuse(call)
    start = resolve(call.config)
    if missing := absent(start.base, start.data):
        raise InputError(
            f"{', '.join(map(relative, missing))}: missing; audit.level=run needs what a fine-tuning begins with; "
            f"make it first by `main` or `finetune` of config={call.config.experiment.name}"
        )
    from dp_lora.launch import is_first, joined, make_fabric
    from dp_lora.models.device import pick_device
    from dp_lora.training.audit import assist_audit, audit_fine_tuning
    from dp_lora.training.private_run import read_inputs

    compute = call.config.compute
    device = pick_device(compute.device)
    fabric = make_fabric(compute, device)
    if not is_first(fabric):
        with joined(fabric, compute, device) as (team, device):
            assist_audit(read_inputs(start, device, team), team)
        return
    with call.tracked() as (run, folder):
        working = private_folder(WORKING / f"audit-{run.run_id}")
        with private_names(AUDIT_STOPPED), joined(fabric, compute, device) as (team, device):
            inputs = read_inputs(start, device, team)
            run.tags({"audit_of": audited_as(start, inputs.bound), "code": inputs.bound["code"]})
            audited = audit_fine_tuning(inputs, working, team)
        _report(call, run, folder / "audit", audited, private=True)


def _report(call: Call, run: TrackedRun, out: Path, audited: "Audited", *, private: bool) -> None:
    from dp_lora.training.audit_report import metrics, table, text, write_picture

    plan, audit = audited.plan, audited.audit
    run.params({"noise_multiplier": plan.noise_multiplier, "sample_rate": plan.sample_rate, "steps": plan.steps})
    for name, value in metrics(audit).items():
        run.metric(name, value, private=private)
    run.table(table(audit), "audit", private=private)
    run.tags({"verdict": audit.verdict}, private=private)
    with whole_folder(out, private=private) as temporary:
        write_json(temporary / "audit.json", audit.as_json())
        write_picture(temporary / "audit.png", audited, run_name("audit", call.config))
    run.image("audit", out / "audit.png", private=private)
    run.artifact(out / "audit.json", private=private)
    run.output(out)
    click.echo(text(audit))
