"""How far the hosts' clocks are apart, from messages whose way took unknown time: bounds, not guesses.

Every rank notes its clock before and after each of a few exchanges in which all hear all. What rank i sent at s_i (on its
clock) reached rank j before r_j, and the other way round, whatever the network did in between. With offsets o that
means s_i - r_j <= o_i - o_j <= r_i - s_j, and the tightest bounds of all rounds hold together (Marzullo and Owicki,
"Maintaining the Time in a Distributed System", 1983; NTP halves the round trip on the same ground). A host is at fault
by what lies outside the bounds. Judging is pure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from dstrain.base.control import ControlPlane
from dstrain.health.sanity_findings import Finding, about

ROUNDS = 5


@dataclass(frozen=True)
class Offset:
    """A clock against rank 0's, in seconds: it is ahead by at least `low` and at most `high`."""

    low: float
    high: float

    @property
    def middle(self) -> float:
        """The best guess."""
        return (self.low + self.high) / 2

    @property
    def doubt(self) -> float:
        """Half of the interval."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class ClockReadings:
    """One rank's clock around each exchange, in Unix seconds."""

    before: Sequence[float]
    after: Sequence[float]


def read_clocks(control: ControlPlane, *, clock: Callable[[], float] = time.time) -> list[ClockReadings]:
    """Collective. Exchange a few words, and every rank's notes of them.

    Args:
        control: agreements between ranks.
        clock: of this host.
    """
    before, after = [], []
    for _ in range(ROUNDS):
        control.barrier()  # so that nobody comes late, which would widen the bounds
        before.append(clock())
        control.barrier()
        after.append(clock())
    return [ClockReadings(*pair) for pair in control.gather_json([before, after])]


def offsets(readings: Sequence[ClockReadings]) -> list[Offset]:
    """Every clock against rank 0's.

    Args:
        readings: of rank 0, 1, ..., all of the same number of exchanges.
    """
    first = readings[0]
    found = []
    for own in readings:
        low = max(sent - heard for sent, heard in zip(own.before, first.after))
        high = min(heard - sent for heard, sent in zip(own.after, first.before))
        found.append(Offset(low, max(low, high)))  # crossed only when a clock was set in between
    return [Offset(0.0, 0.0), *found[1:]]


def of_hosts(found: Sequence[Offset], hosts: Sequence[str]) -> dict[str, Offset]:
    """One offset for each host: its ranks read the same clock, so the bounds of all of them hold."""
    joined: dict[str, Offset] = {}
    for offset, host in zip(found, hosts):
        known = joined.get(host, offset)
        low, high = max(known.low, offset.low), min(known.high, offset.high)
        joined[host] = Offset(min(low, high), max(low, high))
    return joined


def judge_clocks(found: Sequence[Offset], hosts: Sequence[str], *, warn_s: float, limit_s: float | None) -> Finding:
    """Name the hosts whose clock is certainly off the others'.

    Args:
        found: of rank 0, 1, ...
        hosts: of rank 0, 1, ...
        warn_s: seconds from the median that are said.
        limit_s: seconds from the median that fail; None never.
    """
    clocks = of_hosts(found, hosts)
    usual = median(offset.middle for offset in clocks.values())
    spread = max(offset.middle for offset in clocks.values()) - min(offset.middle for offset in clocks.values())
    doubt = max(offset.doubt for offset in clocks.values())
    certain = {host: abs(offset.middle - usual) - offset.doubt for host, offset in clocks.items()}
    if len(clocks) == 2:  # half of the difference lies on each side of the median, and all of it may be either's
        certain = dict.fromkeys(clocks, spread - sum(offset.doubt for offset in clocks.values()))
    off = tuple(rank for rank, host in enumerate(hosts) if certain[host] >= warn_s)
    if not off:
        return Finding("clock", "ok", f"{_seconds(spread)} apart (± {_seconds(doubt)})")
    failed = limit_s is not None and max(certain.values()) >= limit_s
    if len(clocks) == 2:
        text = f"the clocks of {' and '.join(clocks)} are {_seconds(spread)} apart, and two do not say which is wrong"
    else:
        by = max((clocks[hosts[rank]].middle - usual for rank in off), key=abs)
        text = (
            f"the clock of {about(off, hosts)} is {_seconds(abs(by))} {'ahead of' if by > 0 else 'behind'} the others'"
        )
    fix = "start chronyd or ntpd there (`timedatectl` says whether a clock is synchronised)"
    fix += ", or raise start.clock_limit_s" if failed else ""
    where = tuple(hosts[rank] for rank in off)
    return Finding("clock", "failed" if failed else "warning", text, fix, ranks=off, hosts=where)


def _seconds(value: float) -> str:
    return f"{value * 1000:.2g} ms" if value < 0.1 else f"{value:.2f} s"
