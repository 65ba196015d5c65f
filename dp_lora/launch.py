"""Start the ranks of a run, watch them and end them.

Lightning Fabric finds out who this process is: torchrun, Slurm and others start all ranks themselves. Without one of
these the first process of each machine starts the machine's others with its own command line. Fabric would do that
too, but kills the first process without a word when another one ends.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from dp_lora.config.schema import Compute
from dp_lora.errors import InputError
from dp_lora.team import GOES_ON, RankLost, Team

if TYPE_CHECKING:
    from lightning.fabric import Fabric

STARTED = "DPLORA_STARTED_RANK"  # in a process that this module started: the id of the one that did
JOINING = timedelta(minutes=10)  # at least, to come together: a command may be typed on each machine
GRACE = 60.0  # seconds in which the first process may notice by itself that another one has ended


def make_fabric(compute: Compute, device: torch.device) -> "Fabric | None":
    """Fabric that knows this process' rank, nothing started yet; None for a single process.

    InputError where machine or launcher do not have compute.devices x compute.num_nodes.
    """
    size = compute.devices * compute.num_nodes
    shown = f"compute.devices={compute.devices}, compute.num_nodes={compute.num_nodes}"
    if size == 1:
        if (started := os.environ.get("WORLD_SIZE", "1")) != "1":
            raise InputError(f"{shown}: the launcher started {started} processes (WORLD_SIZE); set both so")
        return None
    if device.type == "cuda" and compute.devices > torch.cuda.device_count():
        raise InputError(f"compute.devices={compute.devices}: PyTorch sees {torch.cuda.device_count()} GPUs here")
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy

    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)  # its lines about processes concern no user
    joining = max(JOINING, timedelta(minutes=compute.rank_timeout_minutes))
    try:
        fabric = Fabric(
            accelerator=device.type,
            devices=compute.devices,
            num_nodes=compute.num_nodes,
            strategy=DDPStrategy(process_group_backend="gloo", timeout=joining),
        )
        _environment_of(fabric).validate_settings(num_devices=compute.devices, num_nodes=compute.num_nodes)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{shown}: {' '.join(str(error).split())}") from None
    unset = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]
    if compute.num_nodes > 1 and not started_from_outside(fabric) and unset:
        raise InputError(
            f"{shown}: without torchrun or Slurm each machine needs {', '.join(unset)} in its environment: address and "
            "a free port of the first machine, and its own number from 0"
        )
    return fabric


def is_first(fabric: "Fabric | None") -> bool:
    """Whether this process is rank 0 of the run."""
    return fabric is None or fabric.global_rank == 0


def started_from_outside(fabric: "Fabric | None") -> bool:
    """Whether torchrun, Slurm or another launcher starts the ranks."""
    return fabric is not None and _environment_of(fabric).creates_processes_externally


@contextmanager
def joined(fabric: "Fabric | None", compute: Compute, device: torch.device) -> Iterator[tuple[Team, torch.device]]:
    """All ranks together: the team, and this rank's own device. Raises RankLost when one ends before the others.

    No process that this one started outlives the block; those of a first process that was killed end in a second, and
    those of one that hangs end it.
    """
    if fabric is None:
        yield Team(), device
        return
    if os.environ.get(STARTED):
        threading.Thread(target=_end_with_the_first, daemon=True).start()
    with _from_outside() if started_from_outside(fabric) else _others(fabric, compute.devices):
        minutes = compute.rank_timeout_minutes
        try:
            fabric.launch()
            # a group of its own: gloo's connections keep the timeout that they were made with, whatever is set later
            group = torch.distributed.new_group(timeout=timedelta(minutes=minutes), backend="gloo")
        except RuntimeError as error:
            raise RankLost(f"the ranks did not come together ({' '.join(str(error).split())[:200]})") from None
        yield Team(fabric.global_rank, fabric.world_size, minutes, group), fabric.device
    torch.distributed.destroy_process_group()


@contextmanager
def _from_outside() -> Iterator[None]:
    try:
        yield
    except (InputError, OSError) as error:
        if os.environ.get(STARTED):
            # where the first process fails too, it says what happened, and ends this one meanwhile
            time.sleep(GRACE if isinstance(error, RankLost) else GRACE / 6)
            if isinstance(error, RankLost):
                _end_the_first(str(error))
        raise


def _end_the_first(line: str) -> None:
    """End this process and the one that started it, which hangs: for GRACE it has not noticed that a rank is lost.

    One of this machine's ranks says `line` and does it; the others end with the first (`_end_with_the_first`).
    """
    if os.environ["LOCAL_RANK"] == "1":
        _say(line)
        if os.getppid() == int(os.environ[STARTED]):  # no other process has its number
            os.kill(os.getppid(), signal.SIGKILL)
        os._exit(1)
    time.sleep(GRACE)


def _end_with_the_first() -> None:
    """End this process when the one that started it has ended, however that was: the pipe between them closes then."""
    os.read(0, 1)
    if os.environ["LOCAL_RANK"] == "1":
        _say(f"the first process has ended; {GOES_ON}")
    os._exit(1)


@contextmanager
def _others(fabric: "Fabric", devices: int) -> Iterator[None]:
    """Start this machine's other ranks; end them with the block, at once where it raises."""
    environment = _environment_of(fabric)
    given = {
        "MASTER_ADDR": environment.main_address,
        "MASTER_PORT": str(environment.main_port),
        "NODE_RANK": str(environment.node_rank()),
        "WORLD_SIZE": str(fabric.world_size),
        "LOCAL_RANK": "0",
    }
    if fabric.world_size == devices:
        given["GLOO_SOCKET_IFNAME"] = "lo"  # sums without noise stay on this machine, whatever its name resolves to
    # the run of `mlflow run` is the first rank's alone
    inherited = {name: value for name, value in os.environ.items() if name != "MLFLOW_RUN_ID"}
    others: dict[int, subprocess.Popen] = {}
    over = threading.Event()
    try:
        for local_rank in range(1, devices):
            own = {**inherited, **given, "LOCAL_RANK": str(local_rank), STARTED: str(os.getpid())}
            # a session of its own: Ctrl-C is the first process' alone, which then ends the others
            others[environment.node_rank() * devices + local_rank] = subprocess.Popen(
                [sys.executable, *sys.orig_argv[1:]], env=own, stdin=subprocess.PIPE, start_new_session=True
            )
        threading.Thread(target=_watch, args=(others, over), daemon=True).start()
        with _variables(given):
            yield
        over.set()
        for process in others.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
    except RankLost as lost:
        over.set()
        raise RankLost(_who_ended(others, seconds=2.0) or str(lost)) from None
    finally:
        over.set()
        _kill(others)


def _watch(others: Mapping[int, subprocess.Popen], over: threading.Event) -> None:
    """Where another rank ends and the first process still waits for it after GRACE, end that one too, with a line."""
    while not over.wait(0.5):
        line = _who_ended(others)
        if line and not over.wait(GRACE):
            _say(line)
            _kill(others)
            os._exit(1)


def _who_ended(others: Mapping[int, subprocess.Popen], seconds: float = 0.0) -> str | None:
    end = time.monotonic() + seconds
    while True:
        for rank, process in others.items():
            # a rank that ended well has done its share; the first may still be writing
            if status := process.poll():
                return f"rank {rank} ended (status {status}); {GOES_ON}"
        if time.monotonic() >= end:
            return None
        time.sleep(0.05)


def _kill(others: Mapping[int, subprocess.Popen]) -> None:
    for process in others.values():
        process.kill()
        process.wait()


def _say(line: str) -> None:
    print(f"error: {line}", file=sys.stderr, flush=True)


@contextmanager
def _variables(given: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _environment_of(fabric: "Fabric") -> Any:
    strategy: Any = fabric.strategy
    return strategy.cluster_environment
