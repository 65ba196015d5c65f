"""The text of a batch script: pure functions of settings and a command.

What a script names may be read by whoever reads the run. So it holds no variable of the caller's environment, no
address of a tracking server: Slurm itself hands these over (`sbatch --export=ALL`).
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dp_lora.slurm.settings import Environment, Settings
from dp_lora.slurm.states import NEAR_LIMIT

# what Lightning Fabric and gloo read in each rank
OF_A_RANK = (
    "SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_NODELIST", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES",
    "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME",
)  # fmt: skip
OF_A_RUN = ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_TRACKING_URI")


@dataclass(frozen=True)
class Ranks:
    """How many processes a job's command is started as."""

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


def job_script(
    settings: Settings, name: str, command: str, ranks: Ranks, variables: Mapping[str, str], pass_on: Sequence[str] = ()
) -> str:
    """The script of one entry point.

    `command` is a line of shell, all values in it quoted; `variables` are set for it; a container also gets those that
    `pass_on` names. Near its time limit the job gets SIGUSR1: the work keeps what it can, and begins again where
    settings.requeue says so.
    """
    lines = ["#!/bin/bash", f"# dp-lora {name}, as `mlflow run -b slurm` sent it", *head(settings, name, ranks), ""]
    lines += [f"export {key}={shlex.quote(value)}" for key, value in variables.items()]
    lines += ["unset MLFLOW_EXPERIMENT_NAME  # beside an id MLflow refuses a name that differs"]
    if settings.environment.kind == "venv":
        lines.append(f'export PATH={shlex.quote(settings.environment.value + "/bin")}:"$PATH"')
    started = inside(settings, command, [*variables, *OF_A_RUN, *pass_on, *(OF_A_RANK if ranks.several else ())])
    if not ranks.several:
        lines.append("unset SLURM_NTASKS SLURM_NPROCS  # one process: Lightning need not look for ranks")
        lines += ["", f"{started} &"]
    else:
        if ranks.num_nodes == 1:
            # sums without noise stay on the machine
            lines.append("export GLOO_SOCKET_IFNAME=lo MASTER_ADDR=127.0.0.1")
        lines += ["", f"srun --kill-on-bad-exit=0 bash -c {shlex.quote(_rank(started))} &"]
    return "\n".join([*lines, *_end(settings), ""])


def _rank(started: str) -> str:
    # the run, and the signal before the time limit, are the first rank's alone: it ends the others
    return f'[ "$SLURM_PROCID" = 0 ] || {{ unset MLFLOW_RUN_ID; trap "" USR1; }}; exec {started}'


def inside(settings: Settings, command: str, names: Sequence[str]) -> str:
    """The command as it is started in the environment; a Docker container gets the variables `names`."""
    environment: Environment = settings.environment
    run = f"bash -c {shlex.quote(command)}"
    place = shlex.quote(environment.value)
    if environment.kind == "venv":
        return run
    if environment.kind == "apptainer":
        image = f"docker-archive:{place}" if environment.value.endswith(".tar") else place
        gpus = "--nv " if settings.gpus else ""
        return f'apptainer exec {gpus}--bind "$PWD" --pwd "$PWD" {image} {run}'
    gpus = '--gpus "\\"device=$CUDA_VISIBLE_DEVICES\\"" ' if settings.gpus else ""
    given = "".join(f"--env {name} " for name in dict.fromkeys(names))
    return (
        f'docker run --rm --network host --user "$(id -u):$(id -g)" {gpus}--env HOME=/tmp --env USER=dp-lora {given}'
        f'--volume "$PWD":"$PWD" --workdir "$PWD" $(docker/run_arguments.py {place}) {place} {run}'
    )


def _end(settings: Settings) -> list[str]:
    again = 'scontrol requeue "$SLURM_JOB_ID"' if settings.requeue else "false"
    return [
        "work=$!",
        "near_limit=",
        f"trap 'near_limit=1; kill -{'USR1' if settings.requeue else 'TERM'} \"$work\"' USR1",
        "trap : TERM  # Slurm tells the work itself; this script waits for it",
        "while :; do",
        '    wait "$work"; status=$?',
        '    kill -0 "$work" 2>/dev/null || break  # a signal alone ended the wait',
        "done",
        'if [ -n "$near_limit" ] && [ "$status" -gt 128 ]; then',
        f"    {again} || echo 'stopped before the time limit; it does not begin again by itself' >&2",
        f"    status={NEAR_LIMIT}",
        "fi",
        'exit "$status"',
    ]
