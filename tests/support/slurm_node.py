"""A cluster of one node in a temporary folder, with its own munged, slurmctld and slurmd; it needs root."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tests.support.tracking_server import free_port

# cred_expire=5: a requeued job waits until its credential expires, by default 2 minutes
CONF = """
ClusterName=one
SlurmctldHost={host}
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=5,batch_sched_delay=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MessageTimeout=10
OverTimeLimit=0
KillWait=60
MinJobAge=300
ReturnToService=2
SwitchType=switch/none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=1-0 State=UP
"""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "sinfo")
READY = 60.0  # seconds


class Node:
    """The daemons; `stop` ends them and all their jobs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._daemons: dict[str, subprocess.Popen] = {}
        self._logs: list = []

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables with which Slurm's commands find this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self) -> None:
        """Start all daemons; AssertionError, with their last lines, if the node does not become idle."""
        path = os.environ["PATH"] + os.pathsep + "/usr/sbin"
        lacking = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
        assert not lacking, f"{', '.join(lacking)}: missing; tests/slurm/prepare.sh installs them"
        self.folder.mkdir(parents=True)
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        host = socket.gethostname().partition(".")[0]
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 * 9 // 10
        values = {"folder": self.folder, "host": host, "cpus": os.cpu_count(), "memory": memory}
        ports = {"controller_port": free_port(), "node_port": free_port()}
        (self.folder / "slurm.conf").write_text(CONF.format(**values, **ports), encoding="utf-8")
        own = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._run("munged", "--foreground", "--force", f"--socket={self.folder}/munge.sock", *own)
        self._until((self.folder / "munge.sock").exists, "munged")
        self.start_controller()
        self._run("slurmd", "-D", "-f", str(self.folder / "slurm.conf"), "-N", host)
        self._until(lambda: "idle" in self.ask("sinfo", "--noheader", "--format=%T"), "slurmd")

    def start_controller(self) -> None:
        self._run("slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
        self._until(lambda: "UP" in self.ask("scontrol", "ping"), "slurmctld")

    def stop_controller(self) -> None:
        self._end("slurmctld")

    def ask(self, *command: str) -> str:
        """Run one of Slurm's commands and return its output; empty if it fails."""
        environment = {**os.environ, **self.environment}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
        return done.stdout if done.returncode == 0 else ""

    def jobs(self) -> list[str]:
        """Ids of the jobs that have not ended."""
        return self.ask("squeue", "--noheader", "--format=%i").split()

    def stop(self) -> None:
        """End jobs and daemons, and remove the folder."""
        for job in self.jobs() if "slurmctld" in self._daemons else []:
            self.ask("scancel", job)
        with suppress(AssertionError):
            self._until(lambda: not self.jobs(), "scancel")
        for name in list(self._daemons):
            self._end(name)
        for log in self._logs:
            log.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, name: str, *arguments: str) -> None:
        program = shutil.which(name, path=os.environ["PATH"] + os.pathsep + "/usr/sbin")
        assert program is not None
        log = (self.folder / f"{name}.out").open("a", encoding="utf-8")
        self._logs.append(log)
        environment = {**os.environ, **self.environment}
        # each daemon has its own session: Ctrl-C at the tests' terminal must not end it before its jobs
        self._daemons[name] = subprocess.Popen(
            [program, *arguments], env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip

    def _end(self, name: str) -> None:
        daemon = self._daemons.pop(name)
        daemon.terminate()
        try:
            daemon.wait(30)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def _until(self, holds, name: str) -> None:
        end = time.monotonic() + READY
        while not holds():
            assert time.monotonic() < end, f"{name} is not ready:\n{self.last_lines()}"
            time.sleep(0.2)

    def last_lines(self) -> str:
        """The ends of the daemons' logs."""
        logs = [*self.folder.glob("*.out"), *self.folder.glob("*.log")]
        return "\n".join(f"{path.name}: {path.read_text(errors='replace')[-1500:]}" for path in sorted(logs))
