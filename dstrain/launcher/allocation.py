"""The SLURM allocation that this process runs in: its hosts and how many ranks each takes, or why it cannot be used.

Reads the environment; `gpu_types` reads what `scontrol show job --details` says. Starts no step.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping

from dstrain.base.errors import ConfigError
from dstrain.base.world import expand_nodelist
from dstrain.launcher.hosts import Host, check_host

_PATIENCE_S = 20.0


def num_nodes(environment: Mapping[str, str]) -> int:
    """Nodes of the allocation; 0 outside of one."""
    if not environment.get("SLURM_JOB_NODELIST"):
        return 0
    text = environment.get("SLURM_JOB_NUM_NODES", "1")
    return int(text) if re.fullmatch(r"[1-9]\d{0,5}", text, re.ASCII) else 1


def hosts_of(environment: Mapping[str, str], *, processes: int | None, gpus: int, on_cpu: bool) -> tuple[Host, ...]:
    """The hosts with equal shares of the ranks.

    Args:
        environment: of this process.
        processes: ranks in all; default: `--ntasks-per-node` of the job, else one for each GPU of this machine.
        gpus: that this machine shows.
        on_cpu: ranks use no GPU.

    Raises:
        ConfigError: there is no allocation, it is heterogeneous, or the ranks do not share it evenly.
    """
    nodes = environment.get("SLURM_JOB_NODELIST", "")
    if not nodes:
        raise ConfigError(
            "--with srun: SLURM_JOB_NODELIST is not set: start it inside an allocation (salloc or sbatch), or submit it with --with sbatch"
        )
    if environment.get("SLURM_HET_SIZE"):
        raise ConfigError(
            "this is a heterogeneous SLURM job, whose parts differ: ask for equal nodes in one part (no `:` in salloc, no hetjob line)"
        )
    names = [check_host(name) for name in expand_nodelist(nodes)]
    total = processes or len(names) * _per_node(environment, gpus=gpus, on_cpu=on_cpu)
    if total % len(names):
        raise ConfigError(f"--num-processes {total}: not a multiple of the {len(names)} nodes of the allocation")
    slots = total // len(names)
    have = environment.get("SLURM_GPUS_ON_NODE", "")
    if not on_cpu and have.isdecimal() and 0 < int(have) < slots:
        raise ConfigError(
            f"{slots} ranks on each node and {have} GPUs (SLURM_GPUS_ON_NODE): start one rank for each GPU, "
            f"--num-processes {len(names) * int(have)}"
        )
    return tuple(Host(name, slots) for name in names)


def _per_node(environment: Mapping[str, str], *, gpus: int, on_cpu: bool) -> int:
    asked = environment.get("SLURM_NTASKS_PER_NODE", "")
    if asked.isdecimal():
        return int(asked)
    shares = environment.get("SLURM_TASKS_PER_NODE", "") if environment.get("SLURM_NTASKS") else ""
    match = re.fullmatch(r"(\d{1,6})(\(x\d{1,6}\))?", shares)
    if shares and match is None:
        raise ConfigError(
            f"the allocation has {shares} tasks on its nodes: ranks share nodes evenly; ask for --ntasks-per-node, or give --num-processes"
        )
    return int(match[1]) if match else 1 if on_cpu else max(1, gpus)


def cpus_per_rank(environment: Mapping[str, str], *, slots: int) -> int | None:
    """CPUs of each rank: what the job asked for, else an equal share of the smallest node; None where SLURM says nothing.

    Args:
        environment: of this process.
        slots: ranks of a node.
    """
    asked = environment.get("SLURM_CPUS_PER_TASK", "")
    if re.fullmatch(r"[1-9]\d{0,5}", asked, re.ASCII):
        return int(asked)
    counts = re.fullmatch(
        r"\d{1,6}(\(x\d{1,6}\))?(,\d{1,6}(\(x\d{1,6}\))?)*", environment.get("SLURM_JOB_CPUS_PER_NODE", "")
    )
    if counts is None:
        return None
    return max(1, min(int(part.partition("(")[0]) for part in counts[0].split(",")) // slots)


def gpu_types(text: str) -> dict[str, tuple[str, ...]]:
    """GPU types and the nodes that have them, from `scontrol show job --details`; nothing where SLURM knows no types."""
    found: dict[str, tuple[str, ...]] = {}
    for nodes, resources in re.findall(r"^\s*Nodes=(\S+) .*GRES=(\S+)", text, re.MULTILINE):
        for kind in re.findall(r"gpu:([A-Za-z][A-Za-z0-9._-]*):\d+", resources):
            found[kind] = (*found.get(kind, ()), *expand_nodelist(nodes))
    return found


def check_gpu_types(types: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse an allocation with GPUs of several types: the slowest sets the pace, and bits differ between them.

    Raises:
        ConfigError: naming the types and nodes.
    """
    if len(types) > 1:
        shown = "; ".join(f"{kind} on {', '.join(nodes[:4])}" for kind, nodes in sorted(types.items()))
        one = sorted(types)[0]
        raise ConfigError(f"the allocation mixes GPU types ({shown}): ask for one, for example --gpus-per-node={one}:8")


def ask_gpu_types(job: str) -> dict[str, tuple[str, ...]]:
    """What the controller says of a job; nothing when it does not answer."""
    scontrol = shutil.which("scontrol")
    if scontrol is None or not job.isdecimal():
        return {}
    try:
        done = subprocess.run(
            [scontrol, "show", "job", "--details", job], capture_output=True, text=True, timeout=_PATIENCE_S, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return {}
    return gpu_types(done.stdout) if done.returncode == 0 else {}
