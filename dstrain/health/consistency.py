"""Do all ranks hold the same: weights bit for bit while training, and configuration, code and data at the start.

A fingerprint of weights is a sum of their bit patterns as integers, each times an odd number that depends on its place,
modulo 2^64. One flipped bit changes one term by ±2^k · odd with k < 64, which is never 0 modulo 2^64: every single flip is
seen. Reads weights and changes nothing; repairs nothing. What is partitioned (ZeRO 3) has no replica to compare with.
"""

from __future__ import annotations

import hashlib
import socket
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from dstrain.base.config import Config
from dstrain.base.control import ControlPlane
from dstrain.base.errors import ConfigError, MachineError

OF_THE_MACHINE = frozenset({"code", "python", "torch", "deepspeed", "transformers"})
"""Facts whose difference is a wrongly installed machine rather than a wrong configuration."""

_MASK = (1 << 64) - 1
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = {"cpu": 1 << 15}  # stays in the cache, and is too small for torch to wake other threads, which costs more
_CHUNK_ELSEWHERE = 1 << 24


class ConsistencyConfig(Config):
    """Checks that ranks agree."""

    check_every: int | None = Field(default=100, ge=1)
    """Optimizer steps between two comparisons of the replicated weights; null switches them off."""


@dataclass(frozen=True)
class Divergence:
    """Ranks hold different weights."""

    ranks: tuple[int, ...]
    """Those that differ from the majority; all of them when there is none."""
    majority: int | None
    """The fingerprint of more than half of the ranks; None when there is none, as always with two."""
    hosts: tuple[str, ...]
    """Of `ranks`."""

    def describe(self) -> str:
        """One sentence for people."""
        if self.majority is None:
            return "the weights of the ranks differ, and no majority says whose are right: go back to a checkpoint"
        names = ", ".join(f"rank {rank} on {host}" for rank, host in zip(self.ranks, self.hosts))
        return f"the weights of {names} differ from the majority's: suspect that host's memory or GPU"


def weights_fingerprint(parameters: Iterable[Tensor]) -> int:
    """A 64-bit number that any single flipped bit changes; the same for equal tensors on devices of one kind.

    Args:
        parameters: tensors of any type and shape, in a fixed order; -0.0 and 0.0 differ, as do kinds of NaN.

    Returns:
        0 <= fingerprint < 2^64. Waits for the device once.
    """
    totals: dict[torch.device, Tensor] = {}
    weights: dict[torch.device, Tensor] = {}
    place = 0
    for parameter in parameters:
        data = parameter.detach().contiguous().view(-1)
        device = data.device
        if device not in weights:
            size = _CHUNK.get(device.type, _CHUNK_ELSEWHERE)
            weights[device] = torch.arange(1, 2 * size, 2, dtype=torch.int64, device=device)
            totals[device] = torch.zeros((), dtype=torch.int64, device=device)
        bits = data.view(_INTEGERS[data.element_size()])
        for start in range(0, len(bits), len(weights[device])):
            chunk = bits[start : start + len(weights[device])]
            # Integer products and sums wrap around, which is arithmetic modulo 2^64.
            totals[device] += (chunk * weights[device][: len(chunk)]).sum() * _odd(place)
            place += 1
    return sum(int(total) for total in totals.values()) & _MASK


def _odd(place: int) -> int:
    """An odd number for the place-th chunk, as a signed 64-bit integer (splitmix64, last bit set)."""
    mixed = (place * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = (((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK) | 1
    return mixed - (1 << 64) if mixed >> 63 else mixed


def compare(control: ControlPlane, fingerprint: int) -> Divergence | None:
    """Collective. Whether all ranks have the same fingerprint; the same answer everywhere.

    Args:
        control: agreements between ranks.
        fingerprint: this rank's.
    """
    everybody = control.gather_json([fingerprint, socket.gethostname()])
    found, count = Counter(int(f) for f, _ in everybody).most_common(1)[0]
    if count == len(everybody):
        return None
    majority = found if 2 * count > len(everybody) else None
    ranks = tuple(rank for rank, (f, _) in enumerate(everybody) if int(f) != majority)
    return Divergence(ranks=ranks, majority=majority, hosts=tuple(str(everybody[rank][1]) for rank in ranks))


class ReplicaCheck:
    """Compares the replicated weights every so many steps."""

    def __init__(
        self,
        config: ConsistencyConfig,
        control: ControlPlane,
        *,
        parameters: Callable[[], Iterable[Tensor]],
        is_partitioned: bool,
    ) -> None:
        """Compare nothing yet.

        Args:
            config: how often.
            control: agreements between ranks.
            parameters: gives the weights, in the same order on every rank.
            is_partitioned: each rank holds another part of them (ZeRO 3).
        """
        self._every = config.check_every
        self._control, self._parameters = control, parameters
        self.not_applicable: str | None = None
        """Why nothing is compared, to be said once at the start; None when something is."""
        if control.world.size == 1:
            self.not_applicable = "a single rank has no replica of its weights to compare with"
        elif is_partitioned:
            self.not_applicable = "ZeRO 3 partitions the weights: there are no replicas to compare"

    def is_due(self, step: int) -> bool:
        """Whether the weights are compared after so many steps; the same on every rank."""
        return self.not_applicable is None and self._every is not None and step % self._every == 0

    def after_step(self, step: int) -> Divergence | None:
        """Collective. Compare when it is due.

        Args:
            step: optimizer steps done.
        """
        return compare(self._control, weights_fingerprint(self._parameters())) if self.is_due(step) else None


def check_agreement(
    control: ControlPlane, facts: Mapping[str, str], *, of_the_machine: Collection[str] = OF_THE_MACHINE
) -> None:
    """Collective. Refuse to start when ranks do not have the same facts; all ranks raise alike.

    Args:
        control: agreements between ranks.
        facts: such as the hash of the configuration, the code's and the data's fingerprints, versions of libraries.
        of_the_machine: names of facts that a machine's installation decides.

    Raises:
        ConfigError: a fact of the run differs.
        MachineError: a fact of a machine differs.
    """
    everybody = control.gather_json({"host": socket.gethostname(), "facts": dict(facts)})
    names = sorted({name for one in everybody for name in one["facts"]})
    # The configuration is the likelier fault and the easier mend, so it is named before a machine.
    for name in sorted(names, key=lambda n: (n in of_the_machine, n)):
        values = [str(one["facts"].get(name, "(not given)")) for one in everybody]
        if len(set(values)) > 1:
            message = _disagreement(name, values, [str(one["host"]) for one in everybody])
            if name in of_the_machine:
                raise MachineError(f"{message}: install the same everywhere")
            raise ConfigError(f"{message}: start every rank with the same configuration and data")


def _disagreement(name: str, values: Sequence[str], hosts: Sequence[str]) -> str:
    parts = []
    for value, _ in Counter(values).most_common(3):
        ranks = [rank for rank, v in enumerate(values) if v == value]
        shown = ", ".join(str(r) for r in ranks[:8]) + (", ..." if len(ranks) > 8 else "")
        where = ", ".join(sorted({hosts[r] for r in ranks})[:4])
        parts.append(f"{value!r} on {'ranks' if len(ranks) > 1 else 'rank'} {shown} ({where})")
    return f"the ranks do not agree on {name}: " + ", ".join(parts)


def code_fingerprint() -> str:
    """Version and hash of dstrain's own source files, such as `0.1.0+3f2a9c0d11ab`; some milliseconds."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    try:
        version = metadata.version("dstrain")
    except metadata.PackageNotFoundError:  # run from a source tree
        version = "source"
    return f"{version}+{digest.hexdigest()[:12]}"
