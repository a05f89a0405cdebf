"""A SLURM cluster of one machine, in a folder that is removed at its end: for tests.

Needs root and Debian's packages slurm-wlm and munge; touches no other cluster's files. As a script
it runs a command in such a cluster: ``python tests/slurm/one_node.py squeue``.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CPUS = 2
CONF = """
ClusterName=w2vrep
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=10
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=30
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
"""No accounting, as Debian sets it up: there is no sacct. Who is queued again waits cred_expire."""


def missing() -> str:
    """What this machine lacks; empty: nothing."""
    programs = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel")
    lacks = [name for name in programs if shutil.which(name) is None]
    return ", ".join(lacks) if lacks or os.geteuid() == 0 else "root"


@contextmanager
def one_node() -> Iterator[Path]:
    """Daemons at work and ``SLURM_CONF`` set; yields the folder of their files."""
    root = Path(tempfile.mkdtemp(prefix="slurm-"))
    root.chmod(0o755)  # jobs' users look for the socket
    daemons: list[subprocess.Popen[bytes]] = []
    before = os.environ.get("SLURM_CONF")
    try:
        for name in ("state", "spool"):
            (root / name).mkdir()
        conf = root / "slurm.conf"
        host = socket.gethostname().partition(".")[0]
        conf.write_text(CONF.format(host=host, root=root, ports=_free_ports(2), cpus=CPUS))
        os.environ["SLURM_CONF"] = str(conf)
        key = root / "munge.key"
        subprocess.run(["mungekey", "--create", f"--keyfile={key}"], check=True)
        munge = ["munged", "--foreground", "--force", f"--key-file={key}"]
        munge += [f"--{what}-file={root / f'munge.{what}'}" for what in ("log", "pid", "seed")]
        munge.append(f"--socket={root / 'munge.socket'}")
        for command in (munge, ["slurmctld", "-D"], ["slurmd", "-D", "-N", host]):
            with open(root / f"{command[0]}.out", "wb") as output:
                daemons.append(subprocess.Popen(command, stdout=output, stderr=output))
            if command is munge:
                _until(lambda: (root / "munge.socket").exists(), root)
        _until(lambda: _said(["sinfo", "--noheader", "--format=%T"]) == "idle", root)
        yield root
    finally:
        if len(daemons) == 3:
            subprocess.run(["scancel", "--me"], check=False, capture_output=True)
            with suppress(AssertionError):
                _until(lambda: _said(["squeue", "--noheader"]) == "", root)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(60)
        if before is None:
            os.environ.pop("SLURM_CONF", None)
        else:
            os.environ["SLURM_CONF"] = before
        shutil.rmtree(root, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _said(command: list[str]) -> str:
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()


def _until(happened: object, root: Path, seconds: float = 120.0) -> None:
    last = time.monotonic() + seconds
    while not happened():  # type: ignore[operator]
        logs = "\n".join(path.read_text() for path in sorted(root.glob("*.out")))
        assert time.monotonic() < last, f"SLURM doesn't come up:\n{logs}"
        time.sleep(0.2)


if __name__ == "__main__":
    if lacks := missing():
        sys.exit(f"no SLURM of our own here, for want of {lacks}: apt-get install slurm-wlm munge")
    with one_node():
        sys.exit(subprocess.run(sys.argv[1:], check=False).returncode)
