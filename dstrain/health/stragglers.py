"""Which rank is slow, and at what, from every rank's parts of the step time. Pure: gathers nothing and reads no clock.

The trap is that synchronous ranks all need the same time for a step: the others wait for the slow one, in the collective, so
their communication time grows and the slow rank's shrinks. Who waits the least is the slow one. Hence a rank is judged by
its own work alone (everything but communication), and the network by the least communication time of any rank: the last
to arrive waits for nobody, what it spends there is the transfer itself. Scores are those of NVIDIA's resiliency
extension: 1 is as fast as the fastest rank (or as oneself at one's best), 0.5 is half as fast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from pydantic import Field

from dstrain.base.config import Config

COMMUNICATION = "communication"


class StragglerConfig(Config):
    """When a rank counts as a straggler."""

    every_steps: int = Field(default=50, ge=1)
    """Optimizer steps of one window; the ranks' parts are averaged over it."""
    threshold: float = Field(default=0.75, gt=0.0, lt=1.0)
    """Score below which a rank is slow: 0.75 takes a third longer for its own work than the fastest rank."""
    windows: int = Field(default=3, ge=1)
    """Windows in a row that the same rank must be slow before it is named."""
    min_share: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of the step time that the slowness must cost; below it nobody need act."""


@dataclass(frozen=True)
class StragglerReport:
    """Somebody holds the run up."""

    rank: int | None
    """The slow rank; None when it is the network, which slows all alike."""
    host: str
    cause: str
    """The part in which it loses most: data, compute, or whatever the parts are called; communication for the network."""
    score: float
    """Speed relative to the fastest rank."""
    own_score: float
    """Speed relative to its own best window: near 1, it has always been slow."""
    lost_s: float
    """Seconds of every step that the others wait for it."""
    share: float
    """The same as a share of the step."""
    windows: int
    """Windows in a row so far."""

    def describe(self) -> str:
        """One line for the log."""
        who = "the network" if self.rank is None else f"rank {self.rank} on {self.host}"
        since = "always was" if self.own_score > 0.9 else f"runs at {self.own_score:.0%} of its own best"
        return (
            f"{who} is slow in {self.cause}: {self.score:.0%} of the fastest, {since}; "
            f"costs {self.lost_s:.3g} s ({self.share:.0%}) of every step for {self.windows} windows"
        )


def balance(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """How evenly the ranks work, in a handful of figures for curves; however many ranks, the same figures.

    Args:
        parts: of rank 0, 1, ...: mean seconds of a step by part, as for `StragglerJudge.judge`.

    Returns:
        `slowest`, the number of the rank whose own work takes longest; `work_over_median`, its own work as a multiple of the
        median rank's; `data_excess`, by how much the longest wait for data is longer than the median rank's, as a share of a
        step; `communication_least` and `communication_most`, the shares of a step that the rank with the least and the one
        with the most communication spend there. The least is the network's own: the last to arrive waits for nobody.
    """
    works = [_own_work(p) for p in parts]
    step_s = median(sum(p.values()) for p in parts)
    waits = [p.get("data", 0.0) for p in parts]
    shares = [_share(p.get(COMMUNICATION, 0.0), sum(p.values())) for p in parts]
    return {
        "slowest": float(max(range(len(works)), key=works.__getitem__)),
        "work_over_median": _ratio(max(works), median(works)),
        "data_excess": _share(max(waits) - median(waits), step_s),
        "communication_least": min(shares),
        "communication_most": max(shares),
    }


class StragglerJudge:
    """Remembers each rank's best window and how long somebody has been slow; the same answers on every rank."""

    def __init__(self, config: StragglerConfig, *, hosts: Sequence[str]) -> None:
        """Start without a past.

        Args:
            config: thresholds.
            hosts: of rank 0, 1, ...
        """
        self._config, self._hosts = config, tuple(hosts)
        self._best = [float("inf")] * len(hosts)
        self._best_transfer = float("inf")
        self._slow: int | None = None  # a rank; -1 for the network
        self._streak = 0

    def judge(self, parts: Sequence[Mapping[str, float]]) -> StragglerReport | None:
        """Judge one window.

        Args:
            parts: of rank 0, 1, ...: mean seconds of a step by part; one part is called "communication".

        Returns:
            A report when somebody has been slow for `windows` windows in a row, and again when that number has doubled.
        """
        works = [_own_work(p) for p in parts]
        transfer = min(p.get(COMMUNICATION, 0.0) for p in parts)
        step_s = median(sum(p.values()) for p in parts)
        self._best = [min(best, work) for best, work in zip(self._best, works)]
        self._best_transfer = min(self._best_transfer, transfer)
        slowest = max(range(len(works)), key=works.__getitem__)
        report = self._of_rank(slowest, parts, works, step_s) or self._of_network(transfer, step_s)
        slow = None if report is None else -1 if report.rank is None else report.rank
        self._streak = self._streak + 1 if slow is not None and slow == self._slow else int(slow is not None)
        self._slow = slow
        if report is None or not _is_due(self._streak, self._config.windows):
            return None
        return report

    def _of_rank(
        self, rank: int, parts: Sequence[Mapping[str, float]], works: Sequence[float], step_s: float
    ) -> StragglerReport | None:
        lost = works[rank] - min(works)
        score = _ratio(min(works), works[rank])
        if score >= self._config.threshold or lost < self._config.min_share * step_s:
            return None
        others = [p for other, p in enumerate(parts) if other != rank]
        excess = {
            name: seconds - median(p.get(name, 0.0) for p in others)
            for name, seconds in parts[rank].items()
            if name != COMMUNICATION
        }
        return StragglerReport(
            rank=rank,
            host=self._hosts[rank],
            cause=max(excess, key=excess.__getitem__),
            score=score,
            own_score=_ratio(self._best[rank], works[rank]),
            lost_s=lost,
            share=_ratio(lost, step_s),
            windows=self._streak + 1 if self._slow == rank else 1,
        )

    def _of_network(self, transfer: float, step_s: float) -> StragglerReport | None:
        lost = transfer - self._best_transfer
        score = _ratio(self._best_transfer, transfer)
        if score >= self._config.threshold or lost < self._config.min_share * step_s:
            return None
        return StragglerReport(
            rank=None,
            host="",
            cause=COMMUNICATION,
            score=score,
            own_score=score,
            lost_s=lost,
            share=_ratio(lost, step_s),
            windows=self._streak + 1 if self._slow == -1 else 1,
        )


def _own_work(parts: Mapping[str, float]) -> float:
    """Seconds of a step that wait for no other rank."""
    return sum(seconds for name, seconds in parts.items() if name != COMMUNICATION)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 1.0


def _is_due(streak: int, windows: int) -> bool:
    """At `windows`, twice that, four times, ...: a lasting fault is repeated ever more rarely."""
    times, rest = divmod(streak, windows)
    return streak > 0 and rest == 0 and times & (times - 1) == 0
