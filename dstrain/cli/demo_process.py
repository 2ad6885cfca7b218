"""The demo's child processes: argument lists, never a shell; a process group of their own; stopped so that work is saved.

Signals go to the ranks, not to the launchers above them: a rank that is asked to stop saves and leaves, and its launcher
follows with the rank's exit code. DeepSpeed's own launcher, asked directly, kills what has not left after 30 s.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from shutil import which
from types import FrameType

import psutil

from dstrain.base.errors import MachineError

MODULE = "dstrain.cli.main"
"""What every child runs; the same as the `dstrain` command, but found without PATH."""

GRACE_S = 60.0
"""Seconds a child may take to save and leave before it is killed."""

_POLL_S = 0.1
_STOPPING = (signal.SIGTERM, signal.SIGHUP)
_NOT_INHERITED = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE", "MASTER_ADDR",
    "MASTER_PORT", "SLURM_NTASKS", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip


def child_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a child: no rank of a surrounding job, the CPU as device, nothing fetched from a network."""
    kept = dict(os.environ if environment is None else environment)
    for name in _NOT_INHERITED:
        kept.pop(name, None)
    # Threads that spin while they wait make a machine that others use too many times slower.
    waiting = {"OMP_WAIT_POLICY": "passive", **kept}
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return waiting | quiet | {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}


def dstrain_command(*arguments: str) -> list[str]:
    """`dstrain ARGUMENTS` as one plain process of this interpreter."""
    return [sys.executable, "-m", MODULE, *arguments]


def launcher_command(*arguments: str, num_processes: int, port: int) -> list[str]:
    """`dstrain ARGUMENTS` as ranks of DeepSpeed's launcher on this machine.

    Raises:
        MachineError: the `deepspeed` command is not installed beside this interpreter, nor on PATH.
    """
    beside = Path(sys.executable).parent / "deepspeed"
    found = str(beside) if beside.is_file() else which("deepspeed")
    if found is None:
        raise MachineError(
            f"deepspeed: the launcher is not in {beside.parent}; install DeepSpeed into this environment"
        )
    # --no_local_rank: with --module the launcher would put --local_rank before the subcommand.
    options = ["--num_accelerators", str(num_processes), "--master_port", str(port), "--no_local_rank"]
    return [found, *options, "--log_level", "critical", "--module", MODULE, *arguments]


def run(
    command: Sequence[str],
    *,
    stdout: Path | None = None,
    stop_signal: signal.Signals = signal.SIGINT,
    preempt: Callable[[], bool] | None = None,
) -> int:
    """Run a child to its end and return its exit code; stderr stays on the terminal for progress.

    Args:
        command: program and arguments.
        stdout: file that collects standard output; None shows it.
        stop_signal: asks this kind of child to stop: training takes SIGTERM, other commands clean up on SIGINT.
        preempt: asked ten times a second; once it says True, the ranks get `stop_signal`, as from a scheduler.

    Raises:
        KeyboardInterrupt: a person or a signal stopped the demo; the child has been stopped first.
    """
    children: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(open(stdout, "ab")) if stdout is not None else None
        try:
            with _signals_held():  # a stop between the child's start and its name would leave it behind
                children.append(
                    subprocess.Popen(
                        list(command),
                        env=child_environment(),
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        start_new_session=True,
                    )
                )
            return _wait(children[0], stop_signal, preempt)
        except BaseException:
            for child in children:
                _stop(child, stop_signal)
            raise


def _wait(child: subprocess.Popen[bytes], number: signal.Signals, preempt: Callable[[], bool] | None) -> int:
    asked = False
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(timeout=_POLL_S)
        if preempt is not None and not asked and preempt():
            ask(child.pid, number)
            asked = True


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Hold stop signals back until the end of the block; the child's own handling is not touched."""
    caught: list[int] = []
    previous = {n: signal.signal(n, lambda number, frame: caught.append(number)) for n in (signal.SIGINT, *_STOPPING)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if caught:
        raise KeyboardInterrupt


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM and a closed terminal stop the demo as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = [signal.signal(number, interrupt) for number in _STOPPING]
    try:
        yield
    finally:
        for number, handler in zip(_STOPPING, previous):
            signal.signal(number, handler)


def ask(pid: int, number: signal.Signals) -> None:
    """Send a signal to the ranks below (or at) a process; to its whole group while there are none."""
    ranks = ranks_of(pid)
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.send_signal(number)
    if not ranks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, number)


def ranks_of(pid: int) -> list[psutil.Process]:
    """The processes at or below `pid` that run dstrain itself, launchers left out."""
    found: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        top = psutil.Process(pid)
        for process in (top, *top.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                if _runs_module(process.cmdline()):
                    found.append(process)
    return found


def _runs_module(arguments: Sequence[str]) -> bool:
    """Whether a command line is `python [-u] -m dstrain.cli.main ...`; a launcher names the module only later on."""
    return "-m" in arguments and list(arguments[arguments.index("-m") + 1 :])[:1] == [MODULE]


def _stop(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Ask, wait, and kill whatever is left; a second Ctrl-C kills at once."""
    try:
        ask(child.pid, number)
        child.wait(timeout=GRACE_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        print("dstrain demo: killing what has not left", file=sys.stderr, flush=True)
    finally:
        with contextlib.suppress(ProcessLookupError):  # the group outlives its leader
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
