"""The control plane: tiny agreements between ranks over gloo, on host memory, beside the training collectives.

Sums of counters, "is everyone all right", one rank's JSON to all. Never carries tensors of the model and never touches the
GPU, so that asking costs microseconds and no synchronisation. Every method except the properties is collective: all ranks
call it at the same point, or a rank that does not is found by the timeout.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from dstrain.base.errors import DstrainError, PeerError
from dstrain.base.protocols import Interrupted
from dstrain.base.world import World

ResultT = TypeVar("ResultT")


class ControlPlane:
    """Agreements among the ranks of a world; works alone, without any process group, when the world has one rank."""

    def __init__(self, world: World, *, timeout_s: int = 600) -> None:
        """Collective. Open the gloo group; torch.distributed must be initialised when the world has several ranks."""
        self.world = world
        self._group: Any = None
        if world.size > 1:
            self._group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    @property
    def store(self) -> Any:
        """Local. The key-value store at which the ranks met (torch's), or None for a world of one."""
        return None if self._group is None else distributed.distributed_c10d._get_default_store()

    @property
    def group(self) -> Any:
        """Local. The gloo group itself, for whoever times it; None for a world of one."""
        return self._group

    def sum(self, numbers: Sequence[int]) -> list[int]:
        """Collective. Elementwise sums of 64-bit integers; each sum must stay below 2^63."""
        if self._group is None:
            return list(numbers)
        tensor = torch.tensor(list(numbers), dtype=torch.int64)
        distributed.all_reduce(tensor, group=self._group)
        return [int(n) for n in tensor.tolist()]

    def sum_floats(self, numbers: Sequence[float]) -> list[float]:
        """Collective. Elementwise sums in float64."""
        if self._group is None:
            return list(numbers)
        tensor = torch.tensor(list(numbers), dtype=torch.float64)
        distributed.all_reduce(tensor, group=self._group)
        return [float(n) for n in tensor.tolist()]

    def all_true(self, value: bool) -> bool:
        """Collective. Whether the value is true on every rank."""
        return self.sum([int(not value)])[0] == 0

    def gather_json(self, value: Any) -> list[Any]:
        """Collective. Every rank's JSON-able value, in rank order, on every rank."""
        if self._group is None:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world.size)]
        distributed.all_gather(sizes, torch.tensor([data.numel()]), group=self._group)
        width = max(int(s) for s in sizes)
        padded = torch.zeros(width, dtype=torch.uint8)
        padded[: data.numel()] = data
        parts = [torch.zeros(width, dtype=torch.uint8) for _ in range(self.world.size)]
        distributed.all_gather(parts, padded, group=self._group)
        return [json.loads(bytes(p[: int(s)].tolist())) for p, s in zip(parts, sizes)]

    def from_first(self, value: Any) -> Any:
        """Collective. Rank 0's JSON-able value, on every rank; other ranks' argument is ignored."""
        return self.gather_json(value if self.world.is_first else None)[0]

    def together(self, action: Callable[[], ResultT]) -> ResultT:
        """Collective. Run a local action on every rank; when it fails on one, or is left because of a stop, all leave.

        Raises:
            DstrainError: this rank's own fault.
            PeerError: the fault of the first rank that had one, with its exit code.
            Interrupted: no rank had a fault, and some rank's action raised this.
        """
        fault: DstrainError | None = None
        report: list[Any] | str | None = None
        result: Any = None
        try:
            result = action()
        except DstrainError as error:
            fault, report = error, [str(error), int(error.exit_code)]
        except Interrupted as left:
            report = str(left)
        reports = self.gather_json(report)
        failed = next((rank for rank, found in enumerate(reports) if isinstance(found, list)), None)
        if failed is None:
            if asked := next((found for found in reports if found is not None), None):
                raise Interrupted(asked)
            return result  # type: ignore[no-any-return]
        if fault is not None and failed == self.world.rank:
            raise fault
        message, code = reports[failed]
        raise PeerError(f"rank {failed}: {message}", exit_code=code)

    def barrier(self) -> None:
        """Collective. Wait for every rank."""
        self.sum([0])
