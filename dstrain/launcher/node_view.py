"""What this machine offers to the ranks on it: cores and their NUMA nodes, those of the GPUs, interfaces, a scratch folder. Looks only.

Read from /sys, /proc and the kernel's list of interfaces, without torch, numactl or nvidia-smi, so that it costs milliseconds and works
on login nodes. What cannot be found out is left out: a rank then is not bound by it.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

_SYS = Path("/sys")
_PROC = Path("/proc")


@dataclass(frozen=True, order=True)
class Cpu:
    """One hardware thread; in the order of NUMA node, socket and core, siblings of a core beside each other."""

    node: int
    socket: int
    core: int
    number: int
    """As the kernel counts."""


@dataclass(frozen=True)
class NodeView:
    """One machine, as one process sees it."""

    cpus: tuple[Cpu, ...]
    """Those that this process may use, in order."""
    gpu_nodes: tuple[int, ...] = ()
    """NUMA node of each visible GPU, in the order of CUDA's numbers; empty where that is not known."""
    interfaces: tuple[str, ...] = ()
    scratch: Path = Path("scratch")
    """Folder for what libraries compile: of this user, this Python and this torch."""

    @property
    def cores(self) -> int:
        """Physical cores."""
        return len(cores_of(self.cpus))


def cores_of(cpus: Iterable[Cpu]) -> tuple[tuple[Cpu, ...], ...]:
    """Hardware threads grouped by physical core, in order."""
    found: dict[tuple[int, int, int], list[Cpu]] = {}
    for cpu in sorted(cpus):
        found.setdefault((cpu.node, cpu.socket, cpu.core), []).append(cpu)
    return tuple(tuple(threads) for threads in found.values())


def look_at_node(
    environment: Mapping[str, str], *, allowed: Iterable[int] | None = None, sys_folder: Path = _SYS, proc_folder: Path = _PROC,
) -> NodeView:  # fmt: skip
    """The machine this process runs on.

    Args:
        environment: says which GPUs are visible.
        allowed: CPU numbers; default: this process's affinity.
        sys_folder: /sys.
        proc_folder: /proc.
    """
    numbers = os.sched_getaffinity(0) if allowed is None else allowed
    return NodeView(
        cpus=tuple(sorted(_cpu(sys_folder, number) for number in numbers)),
        gpu_nodes=_gpu_nodes(environment, sys_folder, proc_folder),
        interfaces=interfaces(),
        scratch=scratch_folder(),
    )


def interfaces() -> tuple[str, ...]:
    """Names of this machine's network interfaces."""
    return tuple(sorted(name for _, name in socket.if_nameindex()))


def scratch_folder() -> Path:
    """Where this user's builds for this Python and this torch go on this machine; not made here."""
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = "none"
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Path(tempfile.gettempdir()) / f"dstrain-{os.geteuid()}" / f"python-{python}-torch-{torch}"


def _cpu(sys_folder: Path, number: int) -> Cpu:
    place = sys_folder / f"devices/system/cpu/cpu{number}"
    node = next((int(path.name[4:]) for path in place.glob("node[0-9]*")), 0)
    socket_number = _integer(place / "topology/physical_package_id", default=0)
    # Without a topology (some containers) every hardware thread counts as a core.
    return Cpu(max(0, node), max(0, socket_number), _integer(place / "topology/core_id", default=number), number)


def _gpu_nodes(environment: Mapping[str, str], sys_folder: Path, proc_folder: Path) -> tuple[int, ...]:
    """NUMA nodes of the visible NVIDIA GPUs; CUDA counts equal GPUs in the order of their bus addresses."""
    addresses = sorted(path.name for path in (proc_folder / "driver/nvidia/gpus").glob("*"))
    nodes = [_integer(sys_folder / "bus/pci/devices" / name.lower() / "numa_node", default=-1) for name in addresses]
    # SLURM numbers the GPUs of the machine; CUDA_VISIBLE_DEVICES inside of a job may count those of the job only.
    shown = (
        environment.get("SLURM_STEP_GPUS")
        or environment.get("SLURM_JOB_GPUS")
        or environment.get("CUDA_VISIBLE_DEVICES")
    )
    if shown is None:
        chosen = list(range(len(nodes)))
    elif re.fullmatch(r"\d{1,4}(,\d{1,4})*", shown):
        chosen = [int(index) for index in shown.split(",")]
    else:
        return ()
    if any(index >= len(nodes) or nodes[index] < 0 for index in chosen):
        return ()
    return tuple(nodes[index] for index in chosen)


def _integer(path: Path, *, default: int) -> int:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return default
