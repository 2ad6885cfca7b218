"""What a rank tells the process that watches it, as one argument of its command line. Standard library only."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Mapping
from typing import Any, ClassVar

from dstrain.health.phase_budgets import PhaseBudgets

STACKS_SIGNAL = signal.SIGRTMIN + 5
"""Makes a rank write its stacks; no launcher and no library uses it."""


@dataclasses.dataclass(frozen=True)
class SidecarSettings:
    """What a sidecar is told by its rank; the timings are those of `WatchdogConfig`."""

    TIMING: ClassVar[tuple[str, ...]] = ("poll_s", "publish_s", "report_s", "kill_s", "peer_grace_s")

    run_folder: str
    rank: int
    world_size: int
    pid: int
    started: int
    descriptor: int
    job: str
    first: int
    budgets: PhaseBudgets
    poll_s: float
    publish_s: float
    report_s: float
    kill_s: float
    peer_grace_s: float
    meeting_point: tuple[str, int] | None = None
    """Host and port where the ranks have met, when there are several hosts."""

    def to_plain(self) -> dict[str, Any]:
        """As JSON-able data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> SidecarSettings:
        """Back from `to_plain`."""
        meeting_point = data.get("meeting_point")
        kept = {**data, "budgets": PhaseBudgets(**data["budgets"])}
        return cls(**{**kept, "meeting_point": None if meeting_point is None else (meeting_point[0], meeting_point[1])})
