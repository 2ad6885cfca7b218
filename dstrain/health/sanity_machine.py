"""One machine by itself: packages, accelerator, shared memory, limits, clock, name, network, tools. For `dstrain doctor`.

Each check is a judge of facts, which is pure; `look_at_machine` collects the facts and asks them. Changes nothing.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

from dstrain.base.errors import ExitCode
from dstrain.health.sanity_disk import SCRATCH_BYTES, room_at
from dstrain.health.sanity_findings import Finding

_PACKAGES = ("torch", "deepspeed", "transformers", "numpy")
TOOLS = ("ssh", "pdsh", "srun", "sbatch", "nvidia-smi")
_SHM = Path("/dev/shm")  # noqa: S108  (only asked for its size)
_SHM_BYTES, _SHM_GPU_BYTES = 64 << 20, 1 << 30
"""Docker's default is 64 MB; NCCL wants some tens of MB for each pair of GPUs."""
_OPEN_FILES = 4096
"""A rank holds a socket for each peer, files of shards and of the engine."""
_TIME_ERROR = 5  # adjtimex(2): the kernel's clock is not synchronised
_TIMEX_BYTES = 256
_DRIVER = re.compile(r"Kernel Module\s+(?:for \S+\s+)?(\d+)\.")
OLDEST_DRIVER = {12: 525, 13: 580}
"""NVIDIA's driver that each major version of CUDA needs at least (CUDA compatibility guide, minor-version compatibility)."""


@dataclass(frozen=True)
class MachineFacts:
    """What is looked at."""

    installed: Mapping[str, str]
    """Name → version."""
    required: Sequence[str]
    """Requirements of dstrain, as its package says them."""
    python: str
    cuda_of_torch: str | None
    """The version of CUDA that torch was built for; None for a CPU build."""
    gpus: int
    """That torch can use."""
    driver: int | None
    """Major version of NVIDIA's driver; None without one."""
    shm_bytes: int | None
    open_files: int
    locked_memory: int
    """Bytes; -1 for no limit."""
    has_infiniband: bool
    clock_synchronised: bool | None
    """None when the kernel does not say."""
    host: str
    address: str
    """What the host's own name means on it; empty when nothing."""
    interfaces: Sequence[str]
    tools: Sequence[str]
    """Found on PATH."""
    scratch_bytes: int | None
    stale_locks: Sequence[str] = field(default_factory=tuple)


def judge_machine(facts: MachineFacts) -> list[Finding]:
    """All findings about one machine, in the order of importance."""
    accelerator = judge_accelerator(
        gpus=facts.gpus, driver=facts.driver, torch_version=str(facts.installed.get("torch")),
        cuda_of_torch=facts.cuda_of_torch,
    )  # fmt: skip
    return [
        *_packages(facts), accelerator, _shared_memory(facts), *_limits(facts), _clock(facts), _name(facts), _tools(facts),
        *_scratch(facts), *_locks(facts),
    ]  # fmt: skip


def _packages(facts: MachineFacts) -> list[Finding]:
    wrong = []
    for text in facts.required:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = facts.installed.get(requirement.name.lower())
        if found is None:
            wrong.append(
                _failed("packages", f"{requirement.name} is not installed", f"pip install '{_plain(requirement)}'")
            )
        elif not requirement.specifier.contains(found, prereleases=True):
            what = f"{requirement.name} {found} is installed, {_plain(requirement)} is needed"
            wrong.append(_failed("packages", what, f"pip install '{_plain(requirement)}'"))
    versions = ", ".join(f"{name} {facts.installed.get(name, 'absent')}" for name in _PACKAGES)
    return wrong or [Finding("packages", "ok", f"python {facts.python}, {versions}")]


def _plain(requirement: Requirement) -> str:
    return f"{requirement.name}{requirement.specifier}"


def judge_accelerator(*, gpus: int, driver: int | None, torch_version: str, cuda_of_torch: str | None) -> Finding:
    """Whether torch can use what the driver shows.

    Args:
        gpus: that torch can use.
        driver: major version of NVIDIA's driver; None without one.
        torch_version: installed.
        cuda_of_torch: that it was built for; None for a CPU build.
    """
    if gpus:
        return Finding("accelerator", "ok", f"{gpus} GPUs, torch for CUDA {cuda_of_torch}, driver {driver}")
    if driver is None:
        return Finding("accelerator", "ok", "no NVIDIA driver: runs here use the CPU")
    if cuda_of_torch is None:
        text = f"there is an NVIDIA driver ({driver}), and torch {torch_version} is a CPU build"
        return _failed("accelerator", text, "install a CUDA build of torch (https://pytorch.org/get-started)")
    needed = OLDEST_DRIVER.get(int(cuda_of_torch.split(".")[0]), 0)
    if driver < needed:
        return _failed(
            "accelerator",
            f"torch is built for CUDA {cuda_of_torch}, which needs driver {needed} or newer; {driver} is loaded",
            f"update the driver, or install a torch for an older CUDA (driver {driver} is too old for this one)",
        )
    return _failed(
        "accelerator",
        f"there is an NVIDIA driver ({driver}), and torch for CUDA {cuda_of_torch} sees no GPU",
        "check CUDA_VISIBLE_DEVICES, the job's --gpus-per-node, and nvidia-smi",
    )


def accelerator_here() -> Finding:
    """Local. The same of this machine."""
    return judge_accelerator(
        gpus=torch.cuda.device_count() if torch.cuda.is_available() else 0,
        driver=driver_version(_read("/proc/driver/nvidia/version")), torch_version=torch.__version__,
        cuda_of_torch=torch.version.cuda,
    )  # fmt: skip


def _shared_memory(facts: MachineFacts) -> Finding:
    wanted = _SHM_GPU_BYTES if facts.gpus else _SHM_BYTES
    if facts.shm_bytes is None:
        return Finding("shared memory", "skipped", f"{_SHM} cannot be asked")
    text = f"{_SHM} has {facts.shm_bytes / (1 << 20):.0f} MiB free"
    if facts.shm_bytes < wanted:
        fix = f"start the container with --shm-size={max(1, wanted >> 30)}g or --ipc=host, or remount {_SHM} larger"
        return Finding("shared memory", "warning", f"{text}, {wanted >> 20} are wanted", fix)
    return Finding("shared memory", "ok", text)


def _limits(facts: MachineFacts) -> list[Finding]:
    findings = []
    if 0 <= facts.open_files < _OPEN_FILES:
        what = f"a process may open {facts.open_files} files, {_OPEN_FILES} are wanted for jobs of many ranks"
        findings.append(
            Finding("limits", "warning", what, f"ulimit -n {_OPEN_FILES}, or nofile in /etc/security/limits.conf")
        )
    if facts.has_infiniband and facts.locked_memory >= 0:
        what = f"a process may lock {facts.locked_memory >> 10} KiB of memory, and there is InfiniBand, which locks its buffers"
        findings.append(
            Finding(
                "limits",
                "warning",
                what,
                "ulimit -l unlimited, or memlock in /etc/security/limits.conf and slurmd's unit",
            )
        )
    shown = "no limit" if facts.open_files < 0 else str(facts.open_files)
    return findings or [
        Finding(
            "limits",
            "ok",
            f"open files {shown}, locked memory {'no limit' if facts.locked_memory < 0 else f'{facts.locked_memory >> 10} KiB'}",
        )
    ]


def _clock(facts: MachineFacts) -> Finding:
    if facts.clock_synchronised is None:
        return Finding("clock", "skipped", "the kernel does not say whether it is synchronised")
    if facts.clock_synchronised:
        return Finding("clock", "ok", "synchronised")
    return Finding(
        "clock", "warning", "nothing keeps this host's clock in step", "start chronyd, ntpd or systemd-timesyncd"
    )


def _name(facts: MachineFacts) -> Finding:
    names = ", ".join(facts.interfaces) or "none"
    if not facts.address:
        fix = f"add {facts.host} with its network address to /etc/hosts or to the name server"
        return Finding("network", "warning", f"the name {facts.host} is not known on its own host", fix)
    if facts.address.startswith("127."):
        text = f"the name {facts.host} means {facts.address} here, which is fine on one machine; interfaces: {names}"
        return Finding("network", "ok", text)
    return Finding("network", "ok", f"{facts.host} is {facts.address}; interfaces: {names}")


def _tools(facts: MachineFacts) -> Finding:
    found = ", ".join(facts.tools) or "none"
    missing = ", ".join(name for name in TOOLS if name not in facts.tools) or "none"
    return Finding("tools", "ok", f"found {found}; not found {missing}")


def _scratch(facts: MachineFacts) -> list[Finding]:
    if facts.scratch_bytes is None or facts.scratch_bytes >= SCRATCH_BYTES:
        return []
    text = f"the temporary folder has {facts.scratch_bytes >> 20} MiB free, {SCRATCH_BYTES >> 20} are wanted"
    return [
        Finding("disk", "warning", text, "remove what earlier jobs have left there, or set TMPDIR to a larger disk")
    ]


def _locks(facts: MachineFacts) -> list[Finding]:
    if not facts.stale_locks:
        return []
    text = f"{len(facts.stale_locks)} locks in the cache of compiled ops belong to no process: {', '.join(facts.stale_locks[:3])}"
    return [Finding("caches", "warning", text, "remove these files; whoever wants that op waits for them for ever")]


def _failed(check: str, text: str, fix: str) -> Finding:
    return Finding(check, "failed", text, fix, code=int(ExitCode.UNHEALTHY_NODE))


def look_at_machine(stale_locks: Sequence[str] = ()) -> list[Finding]:
    """Local. Collect the facts of this machine and judge them; a second at most.

    Args:
        stale_locks: files that hold up whoever compiles an op.
    """
    shm, scratch = room_at(_SHM), room_at(Path(os.environ.get("TMPDIR", "/tmp")))  # noqa: S108  (only asked for room)
    host = socket.gethostname()
    return judge_machine(
        MachineFacts(
            installed={name.lower(): version for name in _names() if (version := _version(name))},
            required=_requirements(), python=sys.version.split()[0],
            cuda_of_torch=torch.version.cuda, gpus=torch.cuda.device_count() if torch.cuda.is_available() else 0,
            driver=driver_version(_read("/proc/driver/nvidia/version")),
            shm_bytes=shm.free_bytes if shm is not None else None,
            open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0], locked_memory=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
            has_infiniband=Path("/sys/class/infiniband").is_dir() and any(Path("/sys/class/infiniband").iterdir()),
            clock_synchronised=_clock_is_synchronised(), host=host, address=_address(host), interfaces=_interfaces(),
            tools=[name for name in TOOLS if shutil.which(name)],
            scratch_bytes=scratch.free_bytes if scratch is not None else None, stale_locks=stale_locks,
        )
    )  # fmt: skip


def driver_version(text: str) -> int | None:
    """The major version in /proc/driver/nvidia/version; None when there is none."""
    match = _DRIVER.search(text)
    return int(match[1]) if match else None


def _names() -> set[str]:
    return {Requirement(text).name for text in _requirements()} | set(_PACKAGES)


def _requirements() -> list[str]:
    try:
        return [text for text in metadata.requires("dstrain") or [] if "extra ==" not in text]
    except metadata.PackageNotFoundError:  # run from a source tree
        return []


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _clock_is_synchronised() -> bool | None:
    """What the kernel says (adjtimex(2), asked without setting anything)."""
    try:
        answer = int(ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES)))
    except (OSError, AttributeError):
        return None
    return None if answer < 0 else answer != _TIME_ERROR


def _address(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return ""


def _interfaces() -> list[str]:
    """Names of interfaces that are up, with their rates where these are known."""
    found = []
    try:
        paths = sorted(Path("/sys/class/net").iterdir())
    except OSError:
        return []
    for path in paths:
        if path.name != "lo" and _read(str(path / "operstate")).strip() == "up":
            rate = _read(str(path / "speed")).strip()
            found.append(f"{path.name} {int(rate) / 1000:g} Gb/s" if rate.isdigit() else path.name)
    return found


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
