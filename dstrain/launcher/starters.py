"""How a job is started: exact argument lists and environments for python, deepspeed, torchrun and srun. Pure functions.

Starts nothing and asks nothing. Every rank runs `python -m dstrain.cli.main STAGE ...`, which is there wherever the package
is installed, unlike `launch/*.py`. The launchers run as modules of this interpreter, so that neither PATH nor a shell decides
which one it is.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from dstrain.base.errors import ConfigError
from dstrain.launcher.hosts import Host, check_host, num_processes
from dstrain.launcher.rank_environment import MARKS

Starter = Literal["python", "deepspeed", "torchrun", "srun"]
STARTERS: tuple[Starter, ...] = ("python", "deepspeed", "torchrun", "srun")

MODULE = "dstrain.cli.main"
"""What every rank runs."""
TOKEN = "DSTRAIN_ATTEMPT"
"""Environment variable that marks every process of one attempt, and no other."""

ADDED = (TOKEN, "DS_ACCELERATOR", "MASTER_PORT")
"""All that a starter may add to the environment."""
NOT_INHERITED = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE", "MASTER_ADDR",
    "MASTER_PORT", TOKEN, *MARKS,
)  # fmt: skip
"""Ranks of a surrounding job, and what they have noted about themselves, which the new one must not mistake for its own."""
_NOT_INHERITED_BUT_BY_SRUN = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_ID")

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# pdsh hands words to a remote shell, and DeepSpeed quotes only those with a blank: nothing a shell could read gets that far.
_REMOTE_WORD = re.compile(r"[A-Za-z0-9._+=:@,/%-]+")


@dataclass(frozen=True)
class Layout:
    """Which launcher, and how many ranks where."""

    starter: Starter
    processes: int
    """Ranks of the whole job."""
    hosts: tuple[Host, ...] = ()
    """Machines with equal slots; empty for this machine alone."""
    device: str = "auto"
    """`engine.device` of the run: cpu keeps the launcher itself from looking for GPUs."""
    cpus_per_rank: int | None = None
    """For srun, which since SLURM 22.05 does not take over what the job asked for, and would give each rank one CPU."""

    def on(self, hosts: tuple[Host, ...]) -> Layout:
        """The same layout on other hosts, with as many ranks as they have slots."""
        return replace(self, processes=num_processes(hosts) if hosts else self.processes, hosts=hosts)


@dataclass(frozen=True)
class Command:
    """What is executed."""

    argv: tuple[str, ...]
    added: Mapping[str, str]
    """Environment variables set in addition to those inherited."""
    removed: tuple[str, ...]
    """Environment variables not inherited."""

    def environment(self, inherited: Mapping[str, str], *, token: str) -> dict[str, str]:
        """The whole environment of one attempt."""
        kept = {name: value for name, value in inherited.items() if name not in self.removed}
        return {**kept, **self.added, TOKEN: token}


def build_command(
    layout: Layout, arguments: Sequence[str], *, port: int, hostfile: Path | None = None, folder: str = "",
    rank_logs: Path | None = None,
) -> Command:  # fmt: skip
    """The command that starts one attempt.

    Args:
        layout: launcher, ranks and hosts.
        arguments: what stands behind `dstrain`: the stage, its options and overrides.
        port: free TCP port of the rendezvous.
        hostfile: where the layout's hosts are written for `deepspeed`; needed when it has hosts.
        folder: working folder, which pdsh names to a remote shell.
        rank_logs: beginning of the path of a file for each rank's output (see `rank_log`), where the launcher can write
            such files, which is srun; None leaves all output in one stream.

    Raises:
        ConfigError: a value that cannot be passed on safely, or a layout that the launcher cannot start.
    """
    words = [check_word(word) for word in arguments]
    for host in layout.hosts:
        check_host(host.name)
    _check_layout(layout)
    removed = NOT_INHERITED if layout.starter == "srun" else (*NOT_INHERITED, *_NOT_INHERITED_BUT_BY_SRUN)
    added = {"DS_ACCELERATOR": "cpu"} if layout.device == "cpu" else {}
    if layout.starter == "srun":
        added["MASTER_PORT"] = str(port)
    if layout.starter == "deepspeed" and layout.hosts:
        if hostfile is None:
            raise ConfigError("deepspeed on several hosts needs a place for its hostfile")
        for word in (*words, folder, sys.executable):
            _check_remote(word)
        launcher = _deepspeed_hosts(layout, hostfile, port)
    elif layout.starter == "srun":
        launcher = _srun(layout, rank_logs)
    else:
        launcher = {"python": _python, "deepspeed": _deepspeed, "torchrun": _torchrun}[layout.starter](layout, port)
    return Command((*launcher, *words), added, removed)


def rank_log(rank_logs: Path, rank: int) -> Path:
    """The file of one rank's output."""
    return rank_logs.with_name(f"{rank_logs.name}-rank-{rank:05d}.log")


def check_word(word: str) -> str:
    """Return a word that is safe in an argument list: no control character, nothing empty.

    Raises:
        ConfigError: naming the word.
    """
    if not word or _CONTROL.search(word):
        raise ConfigError(f"argument {word!r}: empty, or with a line break or control character; write it in the YAML")
    try:
        word.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"argument {word!r}: not valid UTF-8; write it in the YAML") from None
    return word


def _check_remote(word: str) -> None:
    if word and _REMOTE_WORD.fullmatch(word) is None:
        raise ConfigError(
            f"{word!r}: pdsh gives it to a shell on the other hosts, where it would not arrive as written; "
            "put the value into the YAML, or use paths of letters, digits and ._+=:@,/%-"
        )


def _check_layout(layout: Layout) -> None:
    if layout.processes < 1:
        raise ConfigError(f"--num-processes {layout.processes}: at least 1")
    if layout.starter == "python" and (layout.processes != 1 or layout.hosts):
        raise ConfigError(f"--with python starts one process, not {layout.processes}: use --with deepspeed or torchrun")
    if layout.starter == "torchrun" and layout.hosts:
        raise ConfigError(
            "--with torchrun starts one machine: use --with deepspeed --hostfile, or srun in an allocation"
        )
    if layout.starter == "srun" and not layout.hosts:
        raise ConfigError(
            "--with srun: not inside a SLURM allocation (SLURM_JOB_NODELIST is not set); use salloc or sbatch"
        )


def _module() -> list[str]:
    return ["-m", MODULE]


def _python(layout: Layout, port: int) -> list[str]:
    return [sys.executable, "-u", *_module()]


def _deepspeed(layout: Layout, port: int) -> list[str]:
    # /dev/null: an existing /job/hostfile, DeepSpeed's default, would turn one machine into many.
    # --no_local_rank: with --module the launcher would put --local_rank before the stage.
    return [
        sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", "/dev/null",
        "--num_accelerators", str(layout.processes), "--master_port", str(port), "--no_local_rank",
        "--log_level", "critical", "--module", MODULE,
    ]  # fmt: skip


def _deepspeed_hosts(layout: Layout, hostfile: Path, port: int) -> list[str]:
    # --force_multi: with one host left the launcher would start on this machine, whichever the host is.
    return [
        sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--force_multi",
        "--launcher", "pdsh", "--master_addr", layout.hosts[0].name, "--master_port", str(port), "--no_local_rank",
        "--module", MODULE,
    ]  # fmt: skip


def _torchrun(layout: Layout, port: int) -> list[str]:
    # Restarts are the supervisor's; torchrun passes USR1 and USR2 on only when told to.
    return [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(layout.processes),
        "--master-addr", "127.0.0.1", "--master-port", str(port), "--max-restarts", "0",
        "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2", *_module(),
    ]  # fmt: skip


def _srun(layout: Layout, rank_logs: Path | None) -> list[str]:
    # --kill-on-bad-exit: SLURM's default lets the others run on, in a collective that never comes back.
    hosts = layout.hosts
    return [
        "srun", f"--nodes={len(hosts)}", f"--ntasks={layout.processes}", f"--ntasks-per-node={hosts[0].slots}",
        f"--nodelist={','.join(host.name for host in hosts)}", "--kill-on-bad-exit=1", "--export=ALL",
        *([] if layout.cpus_per_rank is None else [f"--cpus-per-task={layout.cpus_per_rank}"]),
        *_srun_output(rank_logs), sys.executable, "-u", *_module(),
    ]  # fmt: skip


def _srun_output(rank_logs: Path | None) -> list[str]:
    if rank_logs is None or "\\" in str(rank_logs):  # with a backslash srun puts no numbers in
        return []
    return [f"--output={str(rank_logs).replace('%', '%%')}-rank-%5t.log"]
