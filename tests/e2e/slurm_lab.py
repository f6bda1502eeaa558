"""A real SLURM of several nodes on this machine, which lives as long as the fixture: no root's files, no munge."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.processes.support import wait_until

CONFIGURATION = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
SlurmctldPort={port}
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/controller.log
SlurmdLogFile={folder}/%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdTimeout=10
ReturnToService=2
KillWait=2
SchedulerParameters=sched_interval=1
"""


def is_installed() -> bool:
    """Whether this machine has SLURM's daemons."""
    return all(shutil.which(each) for each in ("slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol"))


@dataclass(frozen=True)
class Cluster:
    """A running SLURM."""

    nodes: Mapping[str, subprocess.Popen[bytes]]
    """By name: its daemon."""
    environment: Mapping[str, str]

    def ask(self, *command: str) -> str:
        """Run a command of SLURM's, and return what it prints."""
        said = subprocess.run(
            command, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=30
        )
        return said.stdout

    def lose(self, node: str) -> None:
        """Let a machine vanish: its daemon and all that it has started, and then the controller hears of it."""
        daemon = self.nodes[node]
        for line in self.ask("squeue", "--noheader", "--array", f"--nodelist={node}", "--format=%A").split():
            for pid in _in_job(line):
                os.kill(pid, signal.SIGKILL)
        daemon.kill()
        daemon.wait()
        self.ask("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")


def _in_job(job: str) -> list[int]:
    """Return the processes that a job has on this machine."""
    wanted, found = f"SLURM_JOB_ID={job}".encode(), []
    for each in Path("/proc").iterdir():
        try:
            if each.name.isdigit() and wanted in (each / "environ").read_bytes().split(b"\0"):
                found.append(int(each.name))
        except OSError:
            continue
    return found


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports: list[int] = [each.getsockname()[1] for each in held]
    for each in held:
        each.close()
    return ports


@contextmanager
def cluster(folder: Path, num_nodes: int) -> Iterator[Cluster]:
    """Start a controller and so many nodes; end them."""
    host, (port, *ports) = socket.gethostname(), _free_ports(num_nodes + 1)
    text = CONFIGURATION.format(host=host, user=getpass.getuser(), port=port, folder=folder)
    names = [f"n{index + 1}" for index in range(num_nodes)]
    for name, at in zip(names, ports, strict=True):
        text += f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={at} CPUs=2\n"
        (folder / name).mkdir()
    text += "PartitionName=all Nodes=ALL Default=YES State=UP\n"
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(text)
    environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def start(*command: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.DEVNULL)

    controller = start("slurmctld", "-D")
    found = Cluster({name: start("slurmd", "-D", "-N", name) for name in names}, environment)
    try:
        assert wait_until(lambda: f"{num_nodes}|idle" in found.ask("sinfo", "--noheader", "--format=%D|%t"))
        yield found
    finally:
        found.ask("scancel", f"--user={getpass.getuser()}")
        wait_until(lambda: not found.ask("squeue", "--noheader"))
        for daemon in (*found.nodes.values(), controller):
            daemon.kill()
            daemon.wait()
