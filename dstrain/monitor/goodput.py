"""Where a run's wall time went, over all its restarts: buckets that sum to it. Pure accounting; reads no clock, no file.

An attempt is one life of rank 0's process. Inside an attempt time is measured by a clock that never jumps; between two
attempts it is that clock when the machine did not restart in between, else the wall clock, and never negative. Work done
after an attempt's last record (some seconds at most) is unknown: it counts as lost, and its steps as new when they are
done again, so nothing is productive twice. The time between a complete attempt and a later one that extends the run is
no part of the run. How often to save, and what goodput to expect, is the `checkpoint` room's matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, get_args

Bucket = Literal[
    "queue", "down", "start_up", "restore", "data_wait", "productive", "replayed", "evaluate", "save_stall", "hang", "other"
]  # fmt: skip

BUCKETS: tuple[Bucket, ...] = get_args(Bucket)

MEANINGS: Mapping[Bucket, str] = {
    "queue": "between attempts, after a stop that saved and asked to be started again",
    "down": "between attempts, after a crash or kill",
    "start_up": "from the start of the process to its first step, without restoring and evaluating",
    "restore": "reading a checkpoint back",
    "data_wait": "steps waiting for data",
    "productive": "steps done for the first time",
    "replayed": "steps done again after a restart or a roll-back",
    "evaluate": "scoring held-out data",
    "save_stall": "training held up by a save",
    "hang": "from the last progress until a hang was detected and ended",
    "other": "everything else inside an attempt",
}
"""One line for each bucket, for tables and pages."""

Outcome = Literal["complete", "saved", "failed", "hang", "killed"]


@dataclass(frozen=True)
class Attempt:
    """What is known of one life of the training process; all durations in seconds."""

    number: int
    """From 1, in order of starting."""
    started_at: float
    """Unix time of the process's start, as the wall clock had it."""
    elapsed_s: float
    """From the start to this record."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """By bucket, up to the last progress; their sum is at most `elapsed_s`, the rest went by since."""
    step: int = 0
    """Highest step reached."""
    resumed_step: int = 0
    """Steps done when the attempt began."""
    replayed_steps: int = 0
    outcome: Outcome | None = None
    """How it ended; None while it runs, and for ever when it was killed."""
    ended_s: float | None = None
    """From the start to the end, where someone who saw the end noted it; at least `elapsed_s`."""
    boot: str = ""
    """Which start of which machine; empty when unknown."""
    started_uptime_s: float = 0.0
    """The machine's uptime at the start."""

    @property
    def lifetime_s(self) -> float:
        """From the start to the last moment known."""
        return max(self.elapsed_s, self.ended_s or 0.0)


@dataclass(frozen=True)
class Goodput:
    """A run's wall time in buckets."""

    seconds: Mapping[Bucket, float]
    """Every bucket, none negative."""
    attempts: int
    step: int
    """Highest step reached."""
    replayed_steps: int

    @property
    def wall_s(self) -> float:
        """The sum of the buckets: the run's wall time."""
        return sum(self.seconds.values())

    @property
    def ratio(self) -> float:
        """Productive share of the wall time, 0 to 1."""
        return self.seconds["productive"] / self.wall_s if self.wall_s > 0 else 0.0

    def to_plain(self) -> dict[str, Any]:
        """For events: seconds by bucket to the millisecond, `wall`, `ratio`, and the counts."""
        return {
            **{bucket: round(seconds, 3) for bucket, seconds in self.seconds.items()},
            "wall": round(self.wall_s, 3),
            "ratio": round(self.ratio, 6),
            "attempts": self.attempts,
            "replayed_steps": self.replayed_steps,
        }

    def table(self) -> str:
        """Several lines for people: the share of every bucket that is not empty, largest first."""
        lives = f"{self.attempts} attempt{'s' if self.attempts != 1 else ''}"
        again = f", {self.replayed_steps:,} steps done again" if self.replayed_steps else ""
        lines = [f"goodput {100 * self.ratio:.1f} % of {_clock(self.wall_s)} in {lives}{again}"]
        for bucket, seconds in sorted(self.seconds.items(), key=lambda item: -item[1]):
            if seconds >= 0.05:
                share = 100 * seconds / self.wall_s
                lines.append(f"  {bucket:<10} {_clock(seconds):>12} {share:5.1f} %  {MEANINGS[bucket]}")
        return "\n".join(lines)


def account(attempts: Sequence[Attempt]) -> Goodput:
    """Merge the records of a run's attempts.

    Args:
        attempts: in any order; the last one may still be running.

    Returns:
        Buckets whose sum is the wall time from the first start to the last moment known.
    """
    lives = sorted(attempts, key=lambda attempt: attempt.number)
    total: dict[Bucket, float] = dict.fromkeys(BUCKETS, 0.0)
    for place, life in enumerate(lives):
        for bucket, seconds in _inside(life).items():
            total[bucket] += seconds
        if place + 1 < len(lives) and life.outcome != "complete":
            total["queue" if life.outcome == "saved" else "down"] += _gap(life, lives[place + 1])
    return Goodput(
        seconds=total,
        attempts=len(lives),
        step=max((life.step for life in lives), default=0),
        replayed_steps=sum(life.replayed_steps for life in lives),
    )


def _inside(life: Attempt) -> dict[Bucket, float]:
    """One attempt's buckets; their sum is its lifetime."""
    inside: dict[Bucket, float] = {bucket: max(0.0, life.seconds.get(bucket, 0.0)) for bucket in BUCKETS}
    known = sum(inside.values())
    if known > life.lifetime_s:
        inside = {bucket: seconds * life.lifetime_s / known for bucket, seconds in inside.items()}
    since_progress = max(0.0, life.lifetime_s - known)
    inside[_silent_bucket(life)] += since_progress
    return inside


def _silent_bucket(life: Attempt) -> Bucket:
    """Where the time since the last progress belongs."""
    if life.outcome == "hang":
        return "hang"
    return "other" if life.step > life.resumed_step else "start_up"


def _gap(before: Attempt, after: Attempt) -> float:
    """Seconds between the last moment known of one attempt and the start of the next."""
    if before.boot and before.boot == after.boot:
        return max(0.0, after.started_uptime_s - before.started_uptime_s - before.lifetime_s)
    return max(0.0, after.started_at - before.started_at - before.lifetime_s)


def _clock(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
