"""How fast the ranks talk: a small and a large all-reduce, and each rank with its two neighbours, timed.

In an all-reduce everybody waits for the slowest, so its times name nobody. Pairs do: neighbours on a ring of hosts exchange a
message, first the even pairs, then the odd ones, and a host whose best pair is far slower than the median is the slow one,
while its neighbours have another, fast pair. That needs three hosts (or, on one host, three ranks); with two there is one
number and no culprit. Pairs go over gloo, so on GPUs they show the hosts' network and not NVLink's. Judging is pure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import distributed

from dstrain.base.control import ControlPlane
from dstrain.health.sanity_findings import Finding, about
from dstrain.health.sanity_links import Expectation

PAIR_BYTES = 1 << 20
_SMALL_TIMES = 10
_LARGE_TIMES = 3
_PAIR_TIMES = 8
_BUDGET_S = 0.5
_LARGE_BYTES = {"cpu": 1 << 23, "cuda": 1 << 26}
_PROBE_BYTES = 1 << 18
_OUTLIER_HOST, _OUTLIER_RANK = 1 / 3, 1 / 10
"""A host, or a rank of one host, whose best pair has less than this share of the median is named. Ranks that share cores differ
severalfold by chance."""


@dataclass(frozen=True)
class AllReduce:
    """What all ranks together reach."""

    latency_s: float
    """Median of small ones, of the slowest rank."""
    size_bytes: int
    seconds: float
    """The best of the large ones, of the slowest rank."""
    world: int

    @property
    def bus_gb_s(self) -> float:
        """Bandwidth of the wire in GB/s, as nccl-tests count it: 2 (n - 1) / n · bytes / time."""
        return 2 * (self.world - 1) / self.world * self.size_bytes / max(self.seconds, 1e-9) / 1e9


@dataclass(frozen=True)
class Pair:
    """Two ranks that exchanged messages."""

    left: int
    right: int
    gb_s: float


def time_all_reduce(control: ControlPlane, device: str) -> AllReduce:
    """Collective. Time the training's own group; about half a second.

    Args:
        control: agreements between ranks.
        device: cpu or cuda, whose back end is timed.
    """
    small = torch.zeros(2, dtype=torch.float32, device=device)
    for _ in range(2):
        distributed.all_reduce(small)  # opens the connections
    latency = median(_timed(lambda: distributed.all_reduce(small), device) for _ in range(_SMALL_TIMES))
    probe = _best(_PROBE_BYTES, device, times=1)
    fits = _PROBE_BYTES * _BUDGET_S / _LARGE_TIMES / max(probe, 1e-6)
    size = int(control.from_first(max(_PROBE_BYTES, min(_LARGE_BYTES[device], int(fits)))))
    seconds = _best(size, device, times=_LARGE_TIMES)
    slowest = [max(times) for times in zip(*control.gather_json([latency, seconds]))]
    return AllReduce(slowest[0], size, slowest[1], control.world.size)


def time_pairs(control: ControlPlane, hosts: Sequence[str]) -> list[Pair]:
    """Collective. Neighbours on a ring exchange messages; of several hosts one rank each, else all ranks.

    Args:
        control: agreements between ranks.
        hosts: of rank 0, 1, ...
    """
    ring = ring_of(hosts)
    own: dict[str, float] = {}
    for pairs in rounds_of(len(ring)):
        control.barrier()
        for left, right in pairs:
            a, b = ring[left], ring[right]
            if control.world.rank in (a, b):
                own[f"{a} {b}"] = _exchange(control, a, b)
    found: dict[tuple[int, int], float] = {}
    for timed in control.gather_json(own):
        for name, seconds in timed.items():
            key = tuple(map(int, name.split()))
            found[key[0], key[1]] = max(found.get((key[0], key[1]), 0.0), seconds)
    return [Pair(a, b, 2 * PAIR_BYTES / max(seconds, 1e-9) / 1e9) for (a, b), seconds in sorted(found.items())]


def ring_of(hosts: Sequence[str]) -> list[int]:
    """The ranks that take part: the first of each host, or all where there is one host."""
    if len(set(hosts)) == 1:
        return list(range(len(hosts)))
    first: dict[str, int] = {}
    for rank, host in enumerate(hosts):
        first.setdefault(host, rank)
    return list(first.values())


def rounds_of(size: int) -> list[list[tuple[int, int]]]:
    """Pairs of neighbours on a ring, in rounds in which nobody is in two pairs.

    Args:
        size: places on the ring.

    Returns:
        Two rounds, or three where the size is odd; every pair of neighbours once.
    """
    if size < 2:
        return []
    edges = [(place, (place + 1) % size) for place in range(size if size > 2 else 1)]
    even = [edge for edge in edges if edge[0] % 2 == 0 and not (size % 2 and edge[0] == size - 1)]
    odd = [edge for edge in edges if edge[0] % 2 == 1]
    last = [edge for edge in edges if size % 2 and edge[0] == size - 1]
    return [found for found in (even, odd, last) if found]


def judge_pairs(pairs: Sequence[Pair], hosts: Sequence[str]) -> Finding | None:
    """Name a rank whose best pair is far slower than the others'; None where all are alike or nobody can be named.

    Args:
        pairs: of neighbours.
        hosts: of rank 0, 1, ...
    """
    best: dict[int, float] = {}
    for pair in pairs:
        for rank in (pair.left, pair.right):
            best[rank] = max(best.get(rank, 0.0), pair.gb_s)
    if len(best) < 3:
        return None
    outlier = _OUTLIER_RANK if len(set(hosts)) == 1 else _OUTLIER_HOST
    usual = median(best.values())
    slow = tuple(sorted(rank for rank, speed in best.items() if speed < outlier * usual))
    if not slow:
        return None
    text = (
        f"{about(slow, hosts)} exchanges {min(best[rank] for rank in slow):.3g} GB/s with its neighbours, the median is "
        f"{usual:.3g} GB/s"
    )
    fix = "look for a cable, port or switch that has fallen back to a lower rate (`ethtool`, `ibstat`) or another job on that host"
    return Finding("network", "warning", text, fix, ranks=slow, hosts=tuple(hosts[rank] for rank in slow))


def judge_all_reduce(found: AllReduce, expected: Expectation | None, *, share: float) -> Finding:
    """Compare with what the link should give, where that is known.

    Args:
        found: what was measured.
        expected: of `sanity_links.expectation`.
        share: of it, below which it is said.
    """
    text = f"all-reduce {found.latency_s * 1e6:.0f} µs small, {found.bus_gb_s:.3g} GB/s with {found.size_bytes / 1e6:.3g} MB"
    if expected is None:
        return Finding("network", "ok", text)
    text += f" (expected about {expected.gb_s:.3g}: {expected.why})"
    if found.bus_gb_s >= share * expected.gb_s:
        return Finding("network", "ok", text)
    fix = (
        "see which interface is used (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME, NCCL_DEBUG=INFO), whether another job uses the "
        "network, and whether a link has fallen back to a lower rate (`ethtool`, `ibstat`)"
    )
    return Finding("network", "warning", text, fix)


def _best(size_bytes: int, device: str, *, times: int) -> float:
    data = torch.zeros(size_bytes // 4, dtype=torch.float32, device=device)
    distributed.all_reduce(data)
    return min(_timed(lambda: distributed.all_reduce(data), device) for _ in range(times))


def _timed(action: Callable[[], Any], device: str) -> float:
    started = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _exchange(control: ControlPlane, left: int, right: int) -> float:
    """Seconds of the best of a few messages there and back."""
    data = torch.zeros(PAIR_BYTES // 4, dtype=torch.float32)
    begins, other = control.world.rank == left, right if control.world.rank == left else left
    best = float("inf")
    for _ in range(_PAIR_TIMES):
        started = time.perf_counter()
        for sends in (begins, not begins):
            if sends:
                distributed.send(data, other, group=control.group)
            else:
                distributed.recv(data, other, group=control.group)
        best = min(best, time.perf_counter() - started)
    return best


def facts(found: AllReduce, pairs: Sequence[Pair]) -> Mapping[str, Any]:
    """Numbers for the event."""
    return {
        "latency_s": found.latency_s, "bus_gb_s": found.bus_gb_s, "size_bytes": found.size_bytes,
        "pairs": [[pair.left, pair.right, round(pair.gb_s, 4)] for pair in pairs],
    }  # fmt: skip
