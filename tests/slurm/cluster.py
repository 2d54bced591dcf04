"""A private Slurm on this host: munged, slurmctld and two slurmd that play two nodes.

Nothing of the machine's own Slurm is read or written: configuration, state, sockets, keys and logs live in one
temporary directory, and every command is pointed there through `SLURM_CONF`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "munged", "sbatch", "shellcheck")
NODES = ("n1", "n2")


def missing() -> str | None:
    """Why a private Slurm cannot run here, or None when it can."""
    if os.geteuid() != 0:
        return "a private slurmd must run as root"
    absent = [name for name in PACKAGES if not find(name)]
    if absent:
        return f"not installed: {', '.join(absent)}; apt-get install slurm-wlm munge shellcheck"
    return None


def find(program: str) -> str | None:
    """Path of `program`; daemons live in sbin directories that a user's PATH may lack."""
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def free_ports(count: int) -> list[int]:
    """`count` distinct TCP ports that were free a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


@dataclass
class Cluster:
    """Two nodes, n1 and n2, on this host. Use as a context manager; leaving it ends all that it started."""

    root: Path
    cpus_per_node: int = 4
    processes: dict[str, subprocess.Popen] = field(default_factory=dict)

    @property
    def conf(self) -> Path:
        return self.root / "slurm.conf"

    @property
    def env(self) -> dict[str, str]:
        """Environment in which Slurm's commands talk to this cluster, free of any outer job's variables."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_", "PMI"))}
        return clean | {"SLURM_CONF": str(self.conf)}

    def __enter__(self) -> Cluster:
        for name in ("state", "munge", "logs", "environment", *(f"spool-{node}" for node in NODES)):
            (self.root / name).mkdir(parents=True, mode=0o755)
        self.root.chmod(0o755)  # munged refuses a socket below a directory that others may not enter
        self._write_conf()
        try:
            self._start_munge()
            self._start("slurmctld", "slurmctld", "-D", "-i")
            for node in NODES:
                self.start_node(node)
            self._await_nodes()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        if "slurmctld" in self.processes:
            self._empty_queue()
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()
        self._kill_leftovers()

    def restore(self) -> None:
        """Empty the queue and bring back every lost node."""
        self._empty_queue()
        for node in NODES:
            if node not in self.processes:
                self.return_node(node)

    def start_node(self, node: str) -> None:
        """Start the slurmd that plays `node`."""
        self._start(node, "slurmd", "-D", "-N", node)

    def lose_node(self, node: str) -> None:
        """Take `node` away as a power cut would: its slurmd and every process on it end, then it is set down."""
        self.processes.pop(node).kill()
        for pid in self._pids_of(f"SLURMD_NODENAME={node}"):
            _kill(pid)
        self.control("update", f"NodeName={node}", "State=DOWN", "Reason=power-cut")

    def return_node(self, node: str) -> None:
        """Bring a lost node back and wait until jobs may use it."""
        self.start_node(node)
        self.control("update", f"NodeName={node}", "State=RESUME")
        self._await_nodes()

    def set_task_environment(self, node: str, **variables: str) -> None:
        """Give every task on `node` these variables through the cluster's task prolog; none clears them."""
        lines = (f"export {key}={value}\n" for key, value in variables.items())
        (self.root / "environment" / node).write_text("".join(lines))

    def control(self, *args: str) -> str:
        """`scontrol ARGS`; returns what it printed."""
        return self.command("scontrol", *args)

    def command(self, *args: str, check: bool = True, env: dict[str, str] | None = None) -> str:
        """Run one command against this cluster; raises with its output when it fails."""
        done = subprocess.run(args, env=self.env | (env or {}), text=True, capture_output=True, timeout=60)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(args)} -> {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def job(self, job_id: int | str) -> dict[str, str]:
        """`scontrol show job` as a mapping, for example {"JobState": "RUNNING", ...}."""
        text = self.control("show", "job", "-o", str(job_id))
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def await_state(self, job_id: int | str, *states: str, timeout: float) -> dict[str, str]:
        """Wait until the job is in one of `states`; raises TimeoutError with the queue and daemon logs."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            job = self.job(job_id)
            if job["JobState"] in states:
                return job
            time.sleep(0.3)
        raise TimeoutError(f"job {job_id} is {job['JobState']} after {timeout} s, not {states}\n{self.logs()}")

    def logs(self) -> str:
        """The last lines of every daemon's log."""
        return "\n".join(
            f"--- {path.name}\n{''.join(path.read_text().splitlines(True)[-15:])}"
            for path in sorted((self.root / "logs").iterdir())
        )

    @staticmethod
    def wait(
        condition: Callable[[], object], seconds: float, failure: str, details: Callable[[], str] = lambda: ""
    ) -> None:
        """Wait until `condition` holds; raises TimeoutError with `failure` and `details()`."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{failure} within {seconds} s\n{details()}")
            time.sleep(0.1)

    def pid(self, job_id: int | str, rank: int, program: str) -> int | None:
        """The main process of a rank of a job, None while there is none.

        Args:
            job_id: of the job, or of one task of an array.
            rank: as `slurm/rank.sh` numbers it.
            program: part of its command line, which tells training from the preflight.
        """
        for pid in self._pids_of(f"SLURM_JOB_ID={job_id}", f"RANK={rank}"):
            with contextlib.suppress(OSError):
                if program in Path(f"/proc/{pid}/cmdline").read_text():
                    return pid
        return None

    def _write_conf(self) -> None:
        controller, *node_ports = free_ports(1 + len(NODES))
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus_per_node}"
            for node, port in zip(NODES, node_ports, strict=True)
        )
        prolog = self.root / "task_prolog"
        prolog.write_text(f'#!/bin/sh\ncat "{self.root}/environment/$SLURMD_NODENAME" 2>/dev/null || true\n')
        prolog.chmod(0o755)
        # cred_expire bounds how long a requeued job must wait before it may start again (120 s by default).
        self.conf.write_text(f"""ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={self.root}/munge/socket,cred_expire=5
StateSaveLocation={self.root}/state
SlurmdSpoolDir={self.root}/spool-%n
SlurmctldPidFile={self.root}/slurmctld.pid
SlurmdPidFile={self.root}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog={prolog}
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=100000,bf_interval=2
JobRequeue=1
KillWait=5
MessageTimeout=10
SlurmdTimeout=30
ReturnToService=2
MpiDefault=none
JobCompType=jobcomp/none
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP
""")

    def _start_munge(self) -> None:
        key = self.root / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = (f"--{name}={self.root}/munge/{name.split('-')[0]}" for name in ("pid-file", "seed-file"))
        self._start(
            "munged",
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            f"--socket={self.root}/munge/socket",
            f"--log-file={self.root}/logs/munge.log",
            *files,
        )
        self.wait(lambda: (self.root / "munge" / "socket").exists(), 10, "munged did not open its socket")

    def _start(self, name: str, program: str, *args: str) -> None:
        with open(self.root / "logs" / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                [find(program), *args], env=self.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def _await_nodes(self) -> None:
        def all_idle() -> bool:
            states = self.command("sinfo", "-h", "-N", "-o", "%T", check=False).split()
            return len(states) == len(NODES) and all(state in ("idle", "mixed", "allocated") for state in states)

        self.wait(all_idle, 60, "the nodes did not come up", self.logs)

    def _empty_queue(self) -> None:
        self.command("scancel", "--user=root", check=False)
        deadline = time.monotonic() + 20
        while self.command("squeue", "-h", check=False).strip() and time.monotonic() < deadline:
            time.sleep(0.2)

    def _pids_of(self, *settings: str) -> list[int]:
        wanted = {setting.encode() for setting in settings} | {f"SLURM_CONF={self.conf}".encode()}
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    environment = (entry / "environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                if wanted <= set(environment):
                    found.append(int(entry.name))
        return sorted(found)

    def _kill_leftovers(self) -> None:
        for pid in self._pids_of():
            _kill(pid)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
