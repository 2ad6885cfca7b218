"""Is each GPU sound: what nvidia-smi says of it, and a product of matrices whose result is known, with its speed.

nvidia-smi comes with every driver, so nothing needs to be installed; it is asked once on each host. The product is exact:
factors of -1, 0 and 1 give integers that bf16 holds, and Freivalds' check (1977; C·x against A·(B·x)) sees a wrong element
with a probability of at least 1/2 for each random vector, of which many are used. Reading is apart from judging, which is pure.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from dstrain.base.errors import ExitCode
from dstrain.health.sanity_findings import Finding, about

FIELDS = (
    "uuid", "name", "driver_version", "temperature.gpu", "memory.free", "memory.total",
    "ecc.errors.uncorrected.volatile.total", "remapped_rows.pending", "remapped_rows.failure",
    "clocks_event_reasons.hw_slowdown", "clocks_event_reasons.hw_thermal_slowdown",
    "clocks_event_reasons.sw_thermal_slowdown", "clocks_event_reasons.hw_power_brake_slowdown",
)  # fmt: skip
"""What is asked (`nvidia-smi --help-query-gpu`). Names differ between drivers: see `known_fields`."""
HOT_C = 88
"""Data-centre GPUs slow down at 85 to 92 °C, depending on the kind."""
_FREE_SHARE = 0.8
_SMI_S = 20.0
_SIZE, _DEPTH, _VECTORS = 4096, 1024, 16
_TIMES = 8
_WARN_SHARE = 0.85
_UNKNOWN_FIELD = re.compile(r'Field "([a-z._]+)" is not a valid field')
_XID = re.compile(r"NVRM: Xid \((?:PCI:)?([0-9A-Fa-f:.]+)\): (\d+)")
FATAL_XIDS = {
    48: "uncorrectable memory error", 63: "a row of memory is to be remapped", 64: "remapping a row has failed",
    74: "NVLink error", 79: "the GPU has fallen off the bus", 94: "contained memory error", 95: "uncontained memory error",
    119: "the GPU's own processor does not answer", 120: "error of the GPU's own processor",
}  # fmt: skip
"""Kernel messages after which a GPU wants a reset or a repair (NVIDIA, "XID Errors")."""


@dataclass(frozen=True)
class GpuState:
    """One line of nvidia-smi's answer; None for what this GPU or driver does not tell."""

    uuid: str
    name: str
    driver: str
    temperature_c: float | None
    free_mib: float | None
    total_mib: float | None
    uncorrected_errors: float | None
    remap_pending: bool
    remap_failed: bool
    slowed_by: tuple[str, ...]


@dataclass(frozen=True)
class Product:
    """How one rank's GPU multiplied."""

    right: bool
    tflops: float
    name: str


def known_fields(fields: Sequence[str], complaint: str) -> list[str]:
    """What to ask instead, after nvidia-smi has refused a field; without it, or by its name before driver 535.

    Args:
        fields: that were asked for.
        complaint: what it has printed, such as `Field "x" is not a valid field to query.`
    """
    match = _UNKNOWN_FIELD.search(complaint)
    if match is None or match[1] not in fields:
        return []
    if match[1].startswith("clocks_event_reasons."):
        return [field.replace("clocks_event_reasons.", "clocks_throttle_reasons.") for field in fields]
    return [field for field in fields if field != match[1]]


def parse_states(text: str, fields: Sequence[str] = FIELDS) -> list[GpuState]:
    """Read `nvidia-smi --query-gpu=... --format=csv,noheader,nounits`; lines of another form are left out.

    Args:
        text: the answer.
        fields: that were asked for; what is missing counts as not told.
    """
    found = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) != len(fields) or not parts[0].startswith("GPU-"):
            continue
        values = {**dict.fromkeys(FIELDS, ""), **dict(zip(fields, parts))}
        slowed = tuple(
            name.rpartition(".")[2] for name in fields if name.startswith("clocks_") and values[name] == "Active"
        )
        found.append(
            GpuState(
                values["uuid"], values["name"], values["driver_version"], _number(values["temperature.gpu"]),
                _number(values["memory.free"]), _number(values["memory.total"]),
                _number(values["ecc.errors.uncorrected.volatile.total"]), values["remapped_rows.pending"] in ("Yes", "1"),
                values["remapped_rows.failure"] in ("Yes", "1"), slowed,
            )
        )  # fmt: skip
    return found


def parse_processes(text: str) -> dict[str, list[str]]:
    """Read `nvidia-smi --query-compute-apps=gpu_uuid,pid,used_memory --format=csv,noheader,nounits`: uuid → `pid (MiB)`."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 3 and parts[0].startswith("GPU-") and parts[1].isdigit():
            found.setdefault(parts[0], []).append(f"{parts[1]} ({parts[2]} MiB)")
    return found


def parse_xids(text: str) -> dict[str, list[int]]:
    """Read the kernel's log: PCI address → the XIDs of `FATAL_XIDS` that it names, each once."""
    found: dict[str, list[int]] = {}
    for address, number in _XID.findall(text):
        if int(number) in FATAL_XIDS and int(number) not in found.get(address, []):
            found.setdefault(address, []).append(int(number))
    return found


def judge_state(
    state: GpuState, processes: Sequence[str] = (), *, own: Sequence[int] = ()
) -> list[tuple[str, str, str]]:
    """What is wrong with a GPU.

    Args:
        state: of the GPU.
        processes: on it, of `parse_processes`.
        own: process ids of this job, which may be there.

    Returns:
        (level, what, fix) of each fault.
    """
    wrong = []
    if state.uncorrected_errors:
        what = f"{state.uncorrected_errors:.0f} uncorrected memory errors since the driver was loaded"
        wrong.append(("failed", what, "reset the GPU (`nvidia-smi --gpu-reset`) or drain the host"))
    if state.remap_failed or state.remap_pending:
        what = (
            "remapping a row of its memory has failed"
            if state.remap_failed
            else "a row of its memory waits to be remapped"
        )
        wrong.append(("failed", what, "reset the GPU; when that does not help, have it replaced"))
    if state.slowed_by:
        what = f"slowed down by {', '.join(state.slowed_by)}"
        wrong.append(("warning", what, "look at the host's cooling and power supplies"))
    elif state.temperature_c is not None and state.temperature_c >= HOT_C:
        wrong.append(("warning", f"{state.temperature_c:.0f} °C before any work", "look at the host's cooling"))
    foreign = [text for text in processes if int(text.split()[0]) not in own]
    if foreign:
        what = f"other processes use it: {', '.join(foreign[:4])}"
        wrong.append(("warning", what, "end them, or take another host"))
    elif (
        not processes
        and state.free_mib is not None
        and state.total_mib
        and state.free_mib < _FREE_SHARE * state.total_mib
    ):
        what = f"only {state.free_mib:.0f} of {state.total_mib:.0f} MiB are free"
        wrong.append(
            ("warning", what, "look for a process that has died and left its memory (`fuser -v /dev/nvidia*`)")
        )
    return wrong


def judge_host(
    states: Sequence[GpuState], processes: Mapping[str, Sequence[str]], xids: Mapping[str, Sequence[int]] | None, *,
    rank: int, host: str, own: Sequence[int] = (),
) -> list[Finding]:  # fmt: skip
    """All GPUs of a host that a job uses.

    Args:
        states: of them.
        processes: of `parse_processes`.
        xids: of `parse_xids`; None when the kernel's log may not be read.
        rank: the first on that host.
        host: its name.
        own: process ids of this job.
    """
    findings = []
    for state in states:
        for level, what, fix in judge_state(state, processes.get(state.uuid, ()), own=own):
            findings.append(_of(level, f"{state.name} {state.uuid[:12]} on {host}: {what}", fix, rank, host))
    for address, numbers in (xids or {}).items():
        what = ", ".join(f"XID {number} ({FATAL_XIDS[number]})" for number in numbers)
        findings.append(
            _of("warning", f"the kernel of {host} names the GPU at {address}: {what}", "reset or drain it", rank, host)
        )
    return findings


def _of(level: str, text: str, fix: str, rank: int, host: str) -> Finding:
    return Finding("gpu", "failed" if level == "failed" else "warning", text, fix, ranks=(rank,), hosts=(host,))


def judge_products(products: Sequence[Product], hosts: Sequence[str], *, share: float) -> list[Finding]:
    """Name GPUs that calculate wrongly, or far slower than the others of their kind.

    Args:
        products: of rank 0, 1, ...
        hosts: of rank 0, 1, ...
        share: of the median of the same kind, below which the run does not begin.
    """
    findings = []
    wrong = tuple(rank for rank, product in enumerate(products) if not product.right)
    if wrong:
        text = f"the GPU of {about(wrong, hosts)} multiplies wrongly: its product is not the one that integers give"
        findings.append(Finding("gpu", "failed", text, "drain the host and have the GPU tested (`dcgmi diag -r 3`)", ranks=wrong,
                                hosts=tuple(hosts[rank] for rank in wrong)))  # fmt: skip
    usual = {
        name: median(product.tflops for product in products if product.name == name)
        for name in {product.name for product in products}
    }
    for level, limit, above in (("failed", share, 0.0), ("warning", max(share, _WARN_SHARE), share)):
        slow = tuple(
            rank for rank, product in enumerate(products)
            if above * usual[product.name] <= product.tflops < limit * usual[product.name]
        )  # fmt: skip
        if slow:
            least = min(slow, key=lambda rank: products[rank].tflops / usual[products[rank].name])
            product = products[least]
            text = (
                f"the {product.name} of {about(slow, hosts)} is slow: {product.tflops:.3g} TFLOP/s, the median of its kind here is "
                f"{usual[product.name]:.3g}"
            )
            fix = "look for throttling, a power limit or another process (`nvidia-smi -q`), or leave the host out"
            findings.append(Finding("gpu", "failed" if level == "failed" else "warning", text, fix, ranks=slow,
                                    hosts=tuple(hosts[rank] for rank in slow)))  # fmt: skip
    if not findings:
        speeds = ", ".join(f"{name} {speed:.3g} TFLOP/s" for name, speed in sorted(usual.items()))
        findings.append(Finding("gpu", "ok", f"products are right, {speeds}", code=int(ExitCode.UNHEALTHY_NODE)))
    return findings


def multiply(device: str, *, size: int = _SIZE, depth: int = _DEPTH) -> Product:
    """Multiply on a device and check the result; some milliseconds on a GPU.

    Args:
        device: cpu or cuda (the current one).
        size: rows and columns of the product.
        depth: at most 1024, so that sums stay far below what bf16 holds exactly (256).
    """
    make = torch.Generator().manual_seed(1)
    a, b = (torch.randint(-1, 2, shape, generator=make) for shape in ((size, depth), (depth, size)))
    x = torch.randint(-1, 2, (size, _VECTORS), generator=make)
    expected = a.double() @ (b.double() @ x.double())
    left, right = a.to(device, torch.bfloat16), b.to(device, torch.bfloat16)
    product = left @ right
    best = float("inf")
    for _ in range(_TIMES if device == "cuda" else 1):
        _synchronize(device)
        started = time.perf_counter()
        product = left @ right
        _synchronize(device)
        best = min(best, time.perf_counter() - started)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return Product(is_product(product, x, expected), 2 * size * size * depth / max(best, 1e-9) / 1e12, name)


def is_product(product: torch.Tensor, x: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether product · x is what it must be, exactly.

    Args:
        product: (size, size), integers in any float type.
        x: (size, vectors), integers.
        expected: (size, vectors), float64.
    """
    return bool(torch.equal(product.double().cpu() @ x.double(), expected))


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def ask_nvidia_smi() -> tuple[list[GpuState], dict[str, list[str]]] | str:
    """Its answers about GPUs and the processes on them, or why there are none."""
    fields = list(FIELDS)
    try:
        while True:
            done = _smi(f"--query-gpu={','.join(fields)}")
            if done.returncode == 0:
                break
            fewer = known_fields(fields, done.stdout + done.stderr)
            if not fewer:
                return f"nvidia-smi failed: {' '.join((done.stdout + done.stderr).split())[:200]}"
            fields = fewer
        processes = _smi("--query-compute-apps=gpu_uuid,pid,used_memory")
    except FileNotFoundError:
        return "nvidia-smi is not installed"
    except subprocess.TimeoutExpired:
        return f"nvidia-smi has not answered for {_SMI_S:g} s: a GPU or the driver hangs"
    except OSError as error:
        return f"nvidia-smi cannot be started: {error.strerror or error}"
    return parse_states(done.stdout, fields), parse_processes(processes.stdout)


def _smi(query: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader,nounits"],  # noqa: S607  (where it is, differs by distribution)
        capture_output=True, text=True, errors="replace", timeout=_SMI_S, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def read_kernel_log() -> str | None:
    """What the kernel has said of NVIDIA's driver; None where only root may read it."""
    try:
        done = subprocess.run(["dmesg"], capture_output=True, text=True, timeout=5.0, check=True, errors="replace")  # noqa: S607
    except (OSError, subprocess.SubprocessError):
        return None
    return "\n".join(line for line in done.stdout.splitlines() if "NVRM" in line)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # [N/A], [Not Supported]
        return None
