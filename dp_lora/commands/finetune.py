"""Fine-tune the base model on private pictures under (epsilon, delta)-differential privacy."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dp_lora.cli.adapters import track_base
from dp_lora.cli.common import Call, entry_point, relative, track_privacy
from dp_lora.cli.early import refuse
from dp_lora.cli.finetuning import KEPT, audited_as, resolve, working_folder
from dp_lora.cli.pipeline import absent, make_missing, would_make
from dp_lora.cli.pipelines import RUNS, private_data, require, to_bring
from dp_lora.cli.prepared import require_prepared
from dp_lora.cli.record import LEDGER, keep_here
from dp_lora.errors import InputError, private_names
from dp_lora.statement import read_privacy
from dp_lora.tracking import TrackedRun

if TYPE_CHECKING:
    from dp_lora.team import Team
    from dp_lora.training.private_run import Inputs
    from dp_lora.training.resolved import Resolved

WORK_STOPPED = "this fine-tuning cannot go on in its working folder; the operator's terminal says why"


@entry_point("finetune")
def main(call: Call) -> None:
    """Fine-tune LoRA weights and class embedding on the private pictures by DP-SGD."""
    refuse(call)
    if not call.dry_run:
        require(call.config, [private_data(call.config)])
    start = resolve(call.config, dry_run=call.dry_run)
    if call.dry_run:
        from dp_lora.training.dry_run_facts import finetuning_facts

        facts = finetuning_facts(start) | to_bring(call.config)
        upstream = would_make(call.config, start.base, start.data)
        shown = call.shown_out("release" if start.plan.guaranteed else "not-private")
        call.print_dry_run(facts, [*upstream, KEPT, relative(start.latents), shown])
        return
    from dp_lora.launch import is_first, joined, make_fabric, started_from_outside
    from dp_lora.models.device import pick_device
    from dp_lora.training.private_run import encode_and_assist, read_inputs

    compute = call.config.compute
    device = pick_device(compute.device)
    fabric = make_fabric(compute, device)
    if is_first(fabric):
        require_prepared(call)
    alone = compute.num_nodes == 1 and not started_from_outside(fabric)
    if not alone and (missing := absent(start.base, start.data)):
        raise InputError(
            f"{', '.join(map(relative, missing))}: missing; make it with one process, before all ranks are started"
        )
    if not is_first(fabric):
        with joined(fabric, compute, device) as (team, device):
            encode_and_assist(read_inputs(start, device, team), team)
        return
    with call.tracked() as (run, folder):
        make_missing(call.config, call.typed, run.environment(), start.base, start.data)
        run.made_from("base", output=relative(start.base))
        run.made_from("private pictures", output=relative(start.data))
        with joined(fabric, compute, device) as (team, device):
            result = _fine_tune(call, run, folder, read_inputs(start, device, team), team)
        _report(call, run, result, start)


def _fine_tune(call: Call, run: TrackedRun, folder: Path, inputs: "Inputs", team: "Team") -> Path:
    """Train in the working folder, and leave the adapter in `folder`."""
    from dp_lora.models.device import pick_precision, precision_name
    from dp_lora.training.private_run import encode_and_train
    from dp_lora.training.result import leave_result
    from dp_lora.training.run_folder import open_run_folder

    config, start = call.config, inputs.start
    working = working_folder(call, start, folder, inputs.bound)
    _track_inputs(run, inputs, working)
    with private_names(WORK_STOPPED), open_run_folder(working, config, inputs.bound) as opened:
        precision = precision_name(pick_precision(config.compute.precision, inputs.device))
        plan = {name: getattr(opened.plan, name) for name in ("noise_multiplier", "sample_rate", "steps")}
        run.params({**plan, "precision": precision, "tf32": "off"})
        result = encode_and_train(inputs, opened, run, team)
    return leave_result(result, folder)


def _track_inputs(run: TrackedRun, inputs: "Inputs", working: Path) -> None:
    from dp_lora.training.run_folder import of_other_data, other_ledgers

    start, data = inputs.start, inputs.bound["data"]
    run.dataset(start.config.experiment.name, start.data, context="private training", private=True)
    track_base(run, start.base, inputs.base["digest"])
    run.made_from("audit", stage="audit", audit_of=audited_as(start, inputs.bound))
    run.tags({"base": inputs.base["path"], "base_digest": inputs.base["digest"]})
    # not in the run: the name depends on the data, so equal names in two runs would show that their data are the same
    keep_here(run.run_id, LEDGER, json.dumps({"folder": relative(working)}).encode())
    for line in of_other_data(RUNS, start.parent, data):
        run.terminal(f"privacy.parent: was begun on other private data, and is added all the same: {line}")
    for line in other_ledgers(RUNS, working, data, start.parent):
        run.terminal(f"the same private data were used before; publishing both adds up (privacy.parent): {line}")


def _report(call: Call, run: TrackedRun, result: Path, start: "Resolved") -> None:
    from dp_lora.models.pipeline_index import steps_and_guidance
    from dp_lora.training.result import EPSILON_OF_DELTA

    statement = read_privacy(result)
    config = call.config
    track_privacy(run, statement, config, statement["steps"])
    run.tags({"statement": statement["statement"], "adapter": relative(result)})
    run.artifact(result)
    run.output(result)
    if statement["private"]:
        run.artifact(result.parent / EPSILON_OF_DELTA)
        # where steps or guidance are null, the registered model states the numbers of its pipeline
        steps, guidance_scale = steps_and_guidance(config.sampling, start.shapes.family)
        drawn = replace(config.sampling, steps=steps, guidance_scale=guidance_scale)
        run.register(replace(config, sampling=drawn), result, start.base)
    click.echo(f"{relative(result)}: {statement['statement']}")
