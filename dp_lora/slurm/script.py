"""The text of a batch script: pure functions of settings and a command.

Everybody who can read the run may read its script. So a script holds no variable of the caller's environment and no
address of a tracking server: Slurm itself passes these on (`sbatch --export=ALL`). The parameters of its command are
the run's own params.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dp_lora.errors import InputError
from dp_lora.slurm.settings import Settings
from dp_lora.slurm.states import JOB_OF, NEAR_LIMIT

# variables that Lightning Fabric and gloo read in each rank
OF_A_RANK = (
    "SLURM_JOB_NAME", "SLURM_NODELIST", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES",
    "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME",
)  # fmt: skip
OF_A_RUN = (
    "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_TRACKING_URI", "SLURM_JOB_ID", "SLURM_CLUSTER_NAME",
    "SLURM_RESTART_COUNT", JOB_OF,
)  # fmt: skip
COMMAND = "DPLORA_COMMAND"  # variable of a script: the job's command line
MOST = 1000  # jobs of an array: Slurm's MaxArraySize is 1001 by default


@dataclass(frozen=True)
class Ranks:
    """The number of processes in which a job starts its command."""

    devices: int = 1  # on each machine
    num_nodes: int = 1

    @property
    def several(self) -> bool:
        return self.devices * self.num_nodes > 1


def head(settings: Settings, name: str, ranks: Ranks) -> list[str]:
    """The lines of #SBATCH."""
    options: dict[str, object] = {
        "job-name": f"dp-lora-{name}",
        "partition": settings.partition,
        "account": settings.account,
        "nodes": ranks.num_nodes,
        "ntasks-per-node": ranks.devices,
        "cpus-per-task": settings.cpus,
        "gres": f"gpu:{settings.gpus}" if settings.gpus else None,
        "mem": settings.memory,
        "time": settings.time,
        "constraint": settings.constraint,
        "signal": f"B:USR1@{settings.signal}",
        "open-mode": "append",
    }
    lines = [f"#SBATCH --{option}={value}" for option, value in options.items() if value is not None]
    lines.append("#SBATCH --requeue" if settings.requeue else "#SBATCH --no-requeue")
    return lines + [f"#SBATCH {line}" for line in settings.extra]


def job_script(settings: Settings, name: str, command: str, ranks: Ranks, variables: Mapping[str, str]) -> str:
    """The script of one entry point.

    `command` is a line of shell, all values in it quoted; `variables` are set for it. Near its time limit the job gets
    SIGUSR1: the work saves what it can, and begins again if settings.requeue says so.
    """
    lines = ["#!/bin/bash", f"# dp-lora {name}, as `mlflow run -b slurm` sent it", *head(settings, name, ranks), ""]
    lines += [f"export {key}={shlex.quote(value)}" for key, value in variables.items()]
    # MLflow refuses an experiment's id together with a name that differs
    lines += ["unset MLFLOW_EXPERIMENT_NAME", *_named(command), f"export {COMMAND}"]
    return "\n".join([*lines, *_work(settings, ranks), ""])


def array_script(settings: Settings, name: str, commands: Sequence[str], limit: int) -> str:
    """The script of an array of jobs, one process each; at most `limit` run at once; each opens its own run.

    `commands` are lines of shell, all values in them quoted. Raises InputError for no command, or more than Slurm's
    own default allows.
    """
    if not 1 <= len(commands) <= MOST:
        raise InputError(f"an array of {len(commands)} jobs: from 1 to {MOST} can be sent at once")
    if limit < 1:
        raise InputError(f"an array of jobs: {limit} at once; at least 1 must run")
    ranks = Ranks()
    lines = ["#!/bin/bash", f"# dp-lora {name}: {len(commands)} jobs", *head(settings, name, ranks)]
    lines += [f"#SBATCH --array=0-{len(commands) - 1}%{limit}", "", 'case "$SLURM_ARRAY_TASK_ID" in']
    for number, command in enumerate(commands):
        lines += [f"{number})", *_named(command), ";;"]
    lines += ["esac", f"export {COMMAND}"]
    return "\n".join([*lines, *_work(settings, ranks), ""])


def _named(command: str) -> list[str]:
    """Lines that put a command into the script's variable, to the letter."""
    if "\n" in command:
        # one of the command's lines could end the here-document below
        return [f"{COMMAND}={shlex.quote(command)}"]
    return [f"IFS= read -r {COMMAND} <<'END'", command, "END"]


def _work(settings: Settings, ranks: Ranks) -> list[str]:
    """Start the command, and wait for its end, or for the signal before the time limit."""
    lines = []
    if settings.environment.kind == "venv":
        lines.append(f'export PATH={shlex.quote(settings.environment.value + "/bin")}:"$PATH"')
    started = _inside(settings, [*OF_A_RUN, *(OF_A_RANK if ranks.several else ())])
    if not ranks.several:
        # with one process, Lightning need not look for ranks
        lines.append("unset SLURM_NTASKS SLURM_NPROCS")
    else:
        if ranks.num_nodes == 1:
            # sums without noise stay on the machine
            lines.append("export GLOO_SOCKET_IFNAME=lo MASTER_ADDR=127.0.0.1")
        if settings.cpus:
            # srun itself does not read --cpus-per-task
            lines.append(f"export SRUN_CPUS_PER_TASK={settings.cpus}")
        started = f"srun bash -c {shlex.quote(_rank(started))}"
    again = 'scontrol requeue "$SLURM_JOB_ID"' if settings.requeue else "false"
    return [
        *lines,
        "",
        "near_limit=",
        f"trap 'near_limit=1; kill -{'USR1' if settings.requeue else 'TERM'} \"$work\"' USR1",
        "trap : TERM  # Slurm tells the work itself; this script waits for it",
        f"{started} &",
        "work=$!",
        "while :; do",
        '    wait "$work"; status=$?',
        '    kill -0 "$work" 2>/dev/null || break  # else a signal ended the wait, not the work',
        "done",
        'if [ -n "$near_limit" ] && [ "$status" -gt 128 ]; then',
        f"    {again} || echo 'stopped before the time limit; it does not begin again by itself' >&2",
        f"    status={NEAR_LIMIT}",
        "fi",
        'exit "$status"',
    ]


def _rank(started: str) -> str:
    # only the first rank gets the run, and the signal before the time limit: it ends the others
    return f'[ "$SLURM_PROCID" = 0 ] || {{ unset MLFLOW_RUN_ID; trap "" USR1; }}; exec {started}'


def _inside(settings: Settings, names: Sequence[str]) -> str:
    """The shell line that starts the command in the environment; a Docker container gets the variables `names`."""
    run = f'bash -c "${COMMAND}"'
    place = shlex.quote(settings.environment.value)
    if settings.environment.kind == "venv":
        return run
    if settings.environment.kind == "apptainer":
        image = f"docker-archive:{place}" if settings.environment.value.endswith(".tar") else place
        gpus = "--nv " if settings.gpus else ""
        return f'apptainer exec {gpus}--bind "$PWD" --pwd "$PWD" {image} {run}'
    # Docker's daemon starts the container outside the job's share of the machine: tell it which GPUs the job has
    gpus = '--gpus "\\"device=$CUDA_VISIBLE_DEVICES\\"" ' if settings.gpus else ""
    given = " ".join(f"--env {name}" for name in names)
    return (
        f'docker run --rm --network host --user "$(id -u):$(id -g)" {gpus}--env HOME=/tmp --env USER=dp-lora {given} '
        f'--volume "$PWD":"$PWD" --workdir "$PWD" $(docker/run_arguments.py {place}) {place} {run}'
    )
