"""How long collectives take: rings inside a node, and between nodes over its network cards. Pure arithmetic.

Hierarchical, as NCCL's rings and trees come out in the end: the bytes of a node's GPUs cross the network once, spread over its cards,
while links inside the node carry the rest. A collective waits for latencies that grow with the logarithm of the nodes. Congestion and
topology above the first switch are not modelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dstrain.planner.devices import Device, Interconnect
from dstrain.train.traffic import Collective

_START_S = 20e-6
"""Fixed cost of a collective: launch and first handshake; 40 µs are fitted for an all-reduce in a node of 8 H200 (two phases)."""


@dataclass(frozen=True)
class Cluster:
    """GPUs and what joins them."""

    device: Device
    gpus: int
    per_node: int
    between: Interconnect

    @property
    def local_ranks(self) -> int:
        """GPUs of one node that take part."""
        return min(self.gpus, self.per_node)

    @property
    def nodes(self) -> int:
        """Nodes that take part."""
        return -(-self.gpus // self.per_node)

    @property
    def node_bandwidth_per_gpu(self) -> float:
        """Bytes/s between nodes that one GPU gets when all of its node send."""
        link = self.between
        return link.gpu_bandwidth * link.achieved / (self.local_ranks if link.shared else 1)


def collective_seconds(collective: Collective, cluster: Cluster) -> float:
    """Time of all calls of one kind of collective in a step, seconds."""
    if cluster.gpus == 1:
        return 0.0
    phases = 2 if collective.kind == "all_reduce" else 1
    local, nodes = cluster.local_ranks, cluster.nodes
    size = collective.num_bytes
    inside = phases * size * (local - 1) / local / cluster.device.link_bandwidth
    across = 0.0
    if nodes > 1:
        across = phases * (size / local) * (nodes - 1) / nodes / cluster.node_bandwidth_per_gpu
    steps = (local - 1).bit_length() * 3e-6 + (
        2 * (nodes - 1).bit_length() * cluster.between.latency_s if nodes > 1 else 0.0
    )
    return inside + across + collective.calls * phases * (_START_S + steps)


def exposed_seconds(collectives: Sequence[Collective], cluster: Cluster, *, backward_s: float, overlap: float) -> float:
    """Communication time that computation does not hide, seconds a step.

    Args:
        collectives: of one optimizer step.
        cluster: who takes part.
        backward_s: time of the backwards that a collective may run beside.
        overlap: share of them that can hide it; 0 for dstrain's settings, where nothing overlaps.
    """
    total = sum(collective_seconds(c, cluster) for c in collectives)
    return max(0.0, total - overlap * backward_s)
