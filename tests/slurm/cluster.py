"""A real Slurm of a few nodes on this machine, started by the tests and gone with them.

Every node is a slurmd of its own under its own name. Nothing of the system is touched: munge key,
configuration, spool and logs lie in a temporary directory, ports are free ones, there are no
cgroups, no systemd and no accounting. Needs root (slurmd starts jobs as their users) and the Debian
packages slurm-wlm and munge.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "sinfo")
PATIENCE_SECONDS = 300.0
"""A machine ten times slower than ours is no failure."""

_CONFIGURATION = """\
ClusterName=zaya
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={control_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0
ReturnToService=2
KillWait=60
MinJobAge=3600
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# cred_expire: how long a requeued job waits at least, 120 s by default; 5 is the least Slurm takes.
# config_overrides: nodes may claim more cores than this machine has.


def why_not() -> str:
    """What keeps Slurm from running here; empty if nothing does."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "slurmd must be started by root"


class Cluster:
    """Nodes n1, n2, ... until `stop`; a context manager."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []
        ports = _free_ports(nodes + 1)
        host = socket.gethostname().split(".")[0]
        lines = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4"
            for name, port in zip(self.names, ports[1:], strict=True)
        ]
        text = _CONFIGURATION.format(host=host, folder=folder, control_port=ports[0])
        # Partitions name nodes, so these come first.
        head, partition, rest = text.partition("PartitionName")
        configuration = head + "\n".join(lines) + "\n" + partition + rest
        (folder / "slurm.conf").write_text(configuration)
        (folder / "state").mkdir()

    def start(self) -> Cluster:
        """Returns once every node is idle."""
        folder = self.folder
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        files = {"key-file": key, "socket": folder / "munge.socket", "pid-file": folder / "m.pid"}
        files |= {"log-file": folder / "munge.log", "seed-file": folder / "munge.seed"}
        words = [f"--{name}={path}" for name, path in files.items()]
        # --force: a temporary directory is not where munge likes its files.
        self._daemon("munged", "--foreground", "--force", *words)
        self.until(lambda: (folder / "munge.socket").exists(), "munge")
        self._daemon("slurmctld", "-D", "-i")
        for name in self.names:
            (folder / name).mkdir()
            self._daemon("slurmd", "-D", "-N", name)
        self.until(lambda: self._states() == {"idle"}, "idle nodes")
        return self

    def stop(self) -> None:
        """Cancel every job, wait until its processes are gone, then end the daemons."""
        self.run("scancel", "--quiet", "--user=root", check=False)
        self.run("scancel", "--quiet", "--user=root", "--signal=KILL", "--full", check=False)
        for _ in range(100):
            if not self.run("squeue", "--noheader", check=False).strip():
                break
            time.sleep(0.1)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def __enter__(self) -> Cluster:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, *words: str, check: bool = True) -> str:
        """A command of Slurm's; its output."""
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, check=False
        )
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def facts(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says, by key."""
        text = self.run("scontrol", "show", "job", job, "--oneliner")
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def until(
        self, there: Callable[[], bool], what: str, patience: float = PATIENCE_SECONDS
    ) -> None:
        """Wait for a condition; AssertionError with the logs when it does not come."""
        deadline = time.monotonic() + patience
        while not there():
            dead = [d.args for d in self._daemons if d.poll() is not None]
            assert not dead and time.monotonic() < deadline, (
                f"no {what}; ended daemons: {dead}\n{self.logs()}"
            )
            time.sleep(0.02)

    def until_state(self, job: str, *states: str, patience: float = PATIENCE_SECONDS) -> None:
        """Wait until the job is in one of `states`."""

        def there() -> bool:
            return self.facts(job)["JobState"] in states

        self.until(there, f"{states} of job {job}", patience)

    def logs(self) -> str:
        """The last lines of every daemon."""
        return "".join(
            f"== {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in sorted(self.folder.glob("*.log"))
        )

    def _daemon(self, *words: str) -> None:
        log = (self.folder / f"{len(self._daemons)}-{words[0]}.log").open("wb")
        with log:
            daemon = subprocess.Popen(
                words, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        self._daemons.append(daemon)

    def _states(self) -> set[str]:
        return set(self.run("sinfo", "--noheader", "--Node", "-o", "%t", check=False).split())


def _free_ports(count: int) -> Sequence[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
