"""Which link the ranks talk over, and what it should give: read from the kernel, and a small table with its sources.

Nothing is expected where the speed is not known, as on most virtual machines. `expectation` is pure.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_CLASS_NET = Path("/sys/class/net")
_CLASS_INFINIBAND = Path("/sys/class/infiniband")
_ROUTES = Path("/proc/net/route")
NVLINK_GB_S = {"H100": 330.0, "H200": 330.0, "H800": 160.0, "A100": 235.0}
"""Bus bandwidth of an all-reduce of 64 MB on eight GPUs of a host, in GB/s. H200: 402 at 128 MB and 220 at 16 MB, A100: 235
(published nccl-tests runs, gathered in the planner's notes); H800 has half of the links."""
LINE_SHARE = 0.85
"""Of a link's rate that an all-reduce gets at best: frames, headers and acknowledgements take the rest."""
GLOO_GB_S = 1.0
"""What gloo gets out of a fast link at most, about: one TCP stream and one thread a pair."""


@dataclass(frozen=True)
class Link:
    """How a host talks to the others."""

    interface: str = ""
    """Empty when it is not known."""
    gbit_s: float | None = None
    """Rate of that interface; None when it is not known."""
    infiniband_gbit_s: float | None = None
    """Rate of all active InfiniBand and RoCE ports together; None without any."""


@dataclass(frozen=True)
class Expectation:
    """What an all-reduce should reach."""

    gb_s: float
    why: str


def expectation(link: Link, *, backend: str, on_one_host: bool, gpu: str = "") -> Expectation | None:
    """The bus bandwidth that a large all-reduce should reach, or None where nobody can say.

    Args:
        link: the slowest host's.
        backend: gloo or nccl.
        on_one_host: whether all ranks are on one machine.
        gpu: its name, such as `NVIDIA H100 80GB HBM3`.
    """
    nvlink = next((speed for name, speed in NVLINK_GB_S.items() if name in gpu and "PCIe" not in gpu), None)
    if on_one_host:
        return None if backend == "gloo" or nvlink is None else Expectation(nvlink, "NVLink")
    if backend == "nccl" and link.infiniband_gbit_s:
        rate = LINE_SHARE * link.infiniband_gbit_s / 8
        return Expectation(min(rate, nvlink or rate), f"InfiniBand or RoCE, {link.infiniband_gbit_s:g} Gb/s a host")
    if link.gbit_s is None:
        return None
    rate = LINE_SHARE * link.gbit_s / 8
    if backend == "gloo" and rate > GLOO_GB_S:
        return Expectation(GLOO_GB_S, f"{link.interface}, {link.gbit_s:g} Gb/s, of which gloo uses a part")
    return Expectation(rate, f"{link.interface}, {link.gbit_s:g} Gb/s")


def slower(left: Link, right: Link) -> Link:
    """The slower of two hosts' links, as far as known."""
    return min(left, right, key=lambda link: (link.gbit_s or float("inf"), link.infiniband_gbit_s or float("inf")))


def own_link(
    environment: Mapping[str, str] | None = None, *, net: Path = _CLASS_NET, infiniband: Path = _CLASS_INFINIBAND
) -> Link:  # fmt: skip
    """This host's link to the others.

    Args:
        environment: defaults to the process environment.
        net: where the kernel shows interfaces.
        infiniband: where it shows InfiniBand and RoCE devices.
    """
    env = os.environ if environment is None else environment
    name = env.get("GLOO_SOCKET_IFNAME", "").split(",")[0] or interface_of_the_route(_read(_ROUTES))
    return Link(name, _rate(net / name) if name else None, _port_rates(infiniband))


def interface_of_the_route(table: str) -> str:
    """Where packets to other hosts leave: the default route's interface, or the first one's where there is no default.

    Args:
        table: the text of /proc/net/route.
    """
    routes = [fields for line in table.splitlines()[1:] if len(fields := line.split()) > 1]
    default = [fields[0] for fields in routes if fields[1] == "00000000"]
    return (default or [fields[0] for fields in routes] or [""])[0]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""


def _rate(interface: Path) -> float | None:
    """Gb/s; None where the driver does not say, or says what virtual ones do: -1."""
    try:
        megabits = int((interface / "speed").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return megabits / 1000 if megabits > 0 else None


def _port_rates(infiniband: Path) -> float | None:
    """Gb/s of all active ports: lines such as `400 Gb/sec (4X NDR)` and `4: ACTIVE`."""
    total = 0.0
    try:
        for port in sorted(infiniband.glob("*/ports/*")):
            if "ACTIVE" in (port / "state").read_text(encoding="ascii"):
                total += float((port / "rate").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return total or None
