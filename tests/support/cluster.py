"""A cluster of virtual hosts on this machine, through `tests/cluster/lab`: commands on hosts, cables, power, SLURM jobs.

Hosts have their own network, process table and host name, and share the file system. Nothing outside of them is touched.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests/cluster/lab"
NODES = ("node1", "node2")
"""The nodes of a cluster: one "GPU" of type a each, and in every partition."""
SPARE = "node3"
"""A third, with a GPU of another type, in partition `all` only."""
_PREFIX = "dstrain-lab-"
_SETTINGS = {
    "CLUSTER_SLOTS": "1",
    "CLUSTER_GPU_TYPES": "a,a,b",
    "CLUSTER_KILLWAIT": "10",
    "CLUSTER_GRACE": "20",
    "CLUSTER_REQUEUE_DELAY": "5",
    "CLUSTER_NODE_TIMEOUT": "15",
}


class LabError(Exception):
    """The cluster cannot be built here, or a command in it failed."""


def missing() -> str:
    """Why no cluster can be built on this machine, or nothing."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    if shutil.which("unshare") is None:
        return "needs util-linux (unshare)"
    probe = ["unshare", "--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "true"]
    if subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        return "needs the right to make network, mount and process namespaces"
    lacking = subprocess.run([SCRIPT, "tools"], capture_output=True, text=True, check=True).stdout.strip()
    if lacking and shutil.which("apt-get") is None:
        return f"needs {lacking}, and there is no apt-get to fetch them"
    return ""


@dataclass(frozen=True)
class Job:
    """What the controller knows of a job."""

    state: str
    restarts: int
    exit_code: str
    nodes: str


class Lab:
    """One cluster: a login node `ctl` with the SLURM controller, and three nodes of one slot each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._environment = {**os.environ, **_SETTINGS, "CLUSTER_DIR": str(folder)}

    @classmethod
    def install(cls) -> Lab:
        """Fetch what is missing and end what a killed session left; the cluster of this session is not up yet.

        Raises:
            LabError: with the reason.
        """
        for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}[0-9]*"):
            if not Path(f"/proc/{left.name.removeprefix(_PREFIX)}").exists():
                cls(left).take_down()
        lab = cls(Path(tempfile.gettempdir()) / f"{_PREFIX}{os.getpid()}")
        with (Path(tempfile.gettempdir()) / f"{_PREFIX}install").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # sessions beside this one may want the same packages
            if lab.command("tools", timeout_s=20):
                lab.command("install", timeout_s=240)
        return lab

    def bring_up(self) -> None:
        """Boot all hosts; returns when SLURM finds them idle."""
        self.command("up", str(len((*NODES, SPARE))))
        self.command("wait-idle", "60")

    def take_down(self) -> None:
        """End everything in it and forget it."""
        self.command("down")
        shutil.rmtree(self.folder, ignore_errors=True)

    def command(self, verb: str, *arguments: str, timeout_s: float = 90) -> str:
        """A verb of the script; returns what it prints.

        Raises:
            LabError: it failed.
        """
        done = subprocess.run(
            [SCRIPT, verb, *arguments], env=self._environment, capture_output=True, text=True, timeout=timeout_s,
            check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if done.returncode != 0:
            raise LabError(
                f"lab {verb} {' '.join(arguments)}: {done.returncode}: {done.stdout[-500:]}{done.stderr[-1500:]}"
            )
        return done.stdout.strip()

    def on(self, host: str, *words: object) -> str:
        """Run a command on a host to its end; returns what it prints."""
        return self.command("exec", host, *map(str, words))

    def start(self, host: str, *words: object, log: Path, environment: dict[str, str] | None = None) -> Started:
        """Start a command on a host, with its output in a file."""
        extra = [f"{name}={value}" for name, value in (environment or {}).items()]
        command = [SCRIPT, "exec", host, *(["env", *extra] if extra else []), *map(str, words)]
        with log.open("ab") as out:
            return Started(
                subprocess.Popen(command, env=self._environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL), log
            )

    def mend(self) -> None:
        """Plug in, boot and start what a test has cut, crashed or killed, and cancel its jobs."""
        self.command("up")
        for node in (*NODES, SPARE):
            self.command("heal", node)
        self.on("ctl", "scancel", "--full", "--user=root")
        self.on("ctl", "scancel", "--signal=KILL", "--full", "--user=root")
        self.command("wait-idle", "180", timeout_s=200)  # beside other work a node takes a minute and more to come back

    def processes(self, host: str, mark: str) -> list[str]:
        """Commands of a host's processes that contain a word."""
        listing = self.on(host, "ps", "-eo", "args=").splitlines()
        return [line for line in listing if mark in line and not line.startswith(("ps ", "sh -c"))]

    # SLURM.

    def submit(self, *words: object) -> str:
        """`sbatch` from the login node; returns the job's number."""
        return self.on("ctl", "sbatch", "--parsable", *words).split(";")[0]

    def job(self, number: str) -> Job:
        """What the controller says now."""
        fields = dict(
            word.split("=", 1)
            for word in self.on("ctl", "scontrol", "--oneliner", "show", "job", number).split()
            if "=" in word
        )
        return Job(fields["JobState"], int(fields["Restarts"]), fields["ExitCode"], fields.get("NodeList", ""))

    def wait_for_job(self, number: str, *states: str, timeout_s: float = 300) -> Job:
        """Until a job is in one of the states (default: the final ones)."""
        wanted = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        wait_until(lambda: self.job(number).state in wanted, what=f"job {number} in {wanted}", timeout_s=timeout_s,
                   tell=lambda: str(self.job(number)))  # fmt: skip
        return self.job(number)


class Started:
    """A command that runs on a host; a context manager that ends it."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log = process, log

    def wait(self, timeout_s: float = 240) -> int:
        """Its exit code."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end in {timeout_s} s:\n{self.output()}") from None

    def output(self) -> str:
        """The end of what it has printed."""
        return self.log.read_text(errors="replace")[-6000:]

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)


def wait_until(
    condition: Callable[[], bool], *, what: str, timeout_s: float = 300, tell: Callable[[], str] = lambda: ""
) -> None:
    """Poll until a condition holds; fails with what it was and what `tell` says."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not reached in {timeout_s} s: {what}\n{tell()}"
        time.sleep(0.1)
