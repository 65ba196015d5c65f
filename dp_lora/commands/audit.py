"""Attack the private step of an experiment, and say what that refutes of the epsilon that is claimed."""

import click

from dp_lora.cli.common import Call, entry_point, relative
from dp_lora.cli.finetuning import audits_path
from dp_lora.files import whole_folder, write_json
from dp_lora.tracking.provenance import run_name


@entry_point("audit")
def main(call: Call) -> None:
    """Audit the private step with canaries: bound, ceiling and claim, and direct numbers; nothing is released."""
    config = call.config
    if call.dry_run:
        from dp_lora.training.planned import audit_facts

        call.print_dry_run(audit_facts(config), [relative(audits_path(config)), call.shown_out("audit")])
        return
    from dp_lora.models.device import pick_device
    from dp_lora.training.audit import audit_private_step, keep_record
    from dp_lora.training.audit_report import metrics, table, text, write_picture

    device = pick_device(config.compute.device)
    with call.tracked() as (run, folder):
        audited = audit_private_step(config, device)
        record = keep_record(audited, audits_path(config))
        plan = audited.plan
        run.params({"noise_multiplier": plan.noise_multiplier, "sample_rate": plan.sample_rate, "steps": plan.steps})
        for name, value in metrics(audited.audit).items():
            run.metric(name, value)
        run.table(table(audited.audit), "audit")
        out = folder / "audit"
        with whole_folder(out) as temporary:
            write_json(temporary / "audit.json", record)
            write_picture(temporary / "audit.png", audited, run_name("audit", config))
        run.tags({"verdict": audited.audit.verdict, "audit_of": record["settings"], "code": record["code"]})
        run.image("audit", out / "audit.png")
        run.artifact(out / "audit.json")
        run.output(out)
        click.echo(text(audited.audit))
