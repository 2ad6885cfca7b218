"""Who holds the others up: the suspect of an incident, from what every rank's watchdog said. Pure.

The rank that waits is the one that notices; the one that hangs is another. Evidence in this order: a process that is gone;
a watchdog that does not answer (its host is down, paused or cut off); a stopped process; where all wait in collectives, the
host whose link went down or that alone is out of reach; the rank that is behind in step and phase; and among ranks at the same
place, the one whose stack is not in a collective. When nothing tells them apart, none is named.
Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dstrain.health.heartbeat import PLACE
from dstrain.health.phase_budgets import STORAGE_PHASES

Facts = Mapping[str, Any]
"""A rank's file: rank, host, pid, phase, step, time_in_phase_s, state, ended, acknowledged, frames ..."""

_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.+)$')
_COLLECTIVE = ("torch/distributed/", "deepspeed/comm/", "base/control.py")
_INNERMOST = 8
_NODE_CAUSES = frozenset({"stopped", "silent", "network", "hung"})


@dataclass(frozen=True)
class Finding:
    """What an incident comes from."""

    cause: str
    """died, left, silent, stopped, network, storage, hung, or unknown."""
    rank: int | None
    """The suspect."""
    host: str
    reason: str
    """One sentence for people."""

    @property
    def is_the_nodes(self) -> bool:
        """Whether the suspect's host had better be left out of the next attempt."""
        return self.rank is not None and self.cause in _NODE_CAUSES


def find_suspect(alarm: Facts, ranks: Sequence[Facts | None]) -> Finding:
    """Name the suspect.

    Args:
        alarm: kind (hung, died, left, or lost: its sender only missed another), rank, host, number, detail.
        ranks: the facts of rank 0, 1, ...; None for a rank that was never heard of.
    """
    kind = alarm.get("kind")
    if kind in ("died", "left"):
        return Finding(str(kind), alarm.get("rank"), str(alarm.get("host", "")), str(alarm.get("detail", "")))
    if kind == "lost":
        return Finding("unknown", None, "", str(alarm.get("detail", "")))
    running = {r: f for r, f in enumerate(ranks) if f is None or not f.get("ended")}
    silent = [r for r, f in running.items() if f is None or f.get("acknowledged") != alarm.get("number")]
    if len(silent) == len(running):
        return Finding("unknown", None, "", "no watchdog has answered the alarm")
    if silent:
        facts = ranks[silent[0]] or {}
        reason = f"the watchdog of {_names(silent)} does not answer: host down, paused, or cut off from the run folder"
        return Finding("silent", silent[0], str(facts.get("host", "unknown host")), reason)
    known = [f for f in running.values() if f is not None]
    stopped = [f for f in known if f.get("state") in ("T", "t")]
    if stopped:
        return _finding(
            "stopped", stopped[0], f"its process is stopped (state {stopped[0]['state']}) {_where(stopped[0])}"
        )
    return _cut_off(known) or _behind(known)


def _cut_off(known: Sequence[Facts]) -> Finding | None:
    """The host that the network has lost, when every rank waits for another."""
    if any(f.get("frames") and not in_collective(f["frames"]) for f in known):
        return None
    lost = [f for f in known if f.get("lost_links")]
    if len({f.get("host") for f in lost}) == 1:
        links = ", ".join(lost[0]["lost_links"])
        return _finding("network", lost[0], f"the link {links} of its host has gone down, {_where(lost[0])}")
    away = [f for f in known if f.get("reaches_meeting_point") is False]
    there = [f for f in known if f not in away]
    hosts_away, hosts_there = sorted({str(f.get("host")) for f in away}), sorted({str(f.get("host")) for f in there})
    if not hosts_away or not hosts_there:
        return None
    if len(hosts_away) == 1 and len(hosts_there) > 1:
        return _finding("network", away[0], f"its host alone does not reach the meeting point, {_where(away[0])}")
    if len(hosts_there) == 1 and len(hosts_away) > 1:
        return _finding("network", there[0], f"no other host reaches its host, the meeting point, {_where(there[0])}")
    reason = f"{_list(hosts_away)} and {_list(hosts_there)} do not reach each other, {_where(away[0])}"
    return Finding("network", None, "", reason)


def _behind(known: Sequence[Facts]) -> Finding:
    least = min(position(f) for f in known)
    behind = [f for f in known if position(f) == least]
    why = f"is behind the others, {_where(behind[0])}"
    if len(known) == 1:
        why = f"makes no progress {_where(behind[0])}"
    elif len(behind) == len(known):
        why = f"is the only one that waits in no collective, {_where(behind[0])}"
    if len(behind) > 1:
        outside = [f for f in behind if f.get("frames") and not in_collective(f["frames"])]
        if len(outside) != 1:
            return Finding("unknown", None, "", f"{_names([f['rank'] for f in behind])} wait alike {_where(behind[0])}")
        if len(behind) < len(known):
            why = f"is behind most others and waits in no collective, {_where(outside[0])}"
        behind = outside
    suspect = behind[0]
    if suspect.get("phase") in STORAGE_PHASES or suspect.get("state") == "D":
        disk = " and its process waits for a device (state D)" if suspect.get("state") == "D" else ""
        return _finding("storage", suspect, f"{why}{disk}: storage or data loading holds it up")
    return _finding("hung", suspect, why)


def position(facts: Facts) -> tuple[int, int]:
    """Where a rank is on the way that all go: by step, then by the order of phases."""
    return int(facts.get("step", 0)), PLACE.get(str(facts.get("phase")), 0)


def is_alibi(mine: Facts, other: Facts) -> bool:
    """Whether another rank explains why this one waits: it is behind, awake, and still within its own allowance."""
    return (
        position(other) < position(mine)
        and not other.get("ended")
        and other.get("state") not in ("T", "t", "Z", "")
        and float(other.get("time_in_phase_s", 0.0)) <= float(other.get("allowance_s", 0.0))
    )


def main_frames(stacks: str) -> list[str]:
    """The main thread's frames, innermost first, from the newest dump in a file that faulthandler wrote.

    A dump lists the threads in turn, the main thread last; a signal's dump ends with it, too.
    """
    frames: list[str] = []
    for line in stacks.splitlines():
        if line.startswith(("Thread 0x", "Current thread 0x", "Stack (most recent")):
            frames = []
        elif match := _FRAME.match(line):
            frames.append(f"{match[1]}:{match[2]} {match[3]}")
    return frames


def in_collective(frames: Sequence[str]) -> bool:
    """Whether the innermost frames are those of a collective."""
    return any(part in frame for frame in frames[:_INNERMOST] for part in _COLLECTIVE)


def describe(alarm: Facts, finding: Finding) -> str:
    """The one line for the log."""
    who = "no rank can be named" if finding.rank is None else f"suspect: rank {finding.rank} on {finding.host}"
    noticed = f"noticed by rank {alarm.get('rank')} on {alarm.get('host')}"
    return f"incident {alarm.get('number')} ({finding.cause}), {noticed}: {who}: {finding.reason}"


def _finding(cause: str, facts: Facts, reason: str) -> Finding:
    return Finding(cause, int(facts["rank"]), str(facts.get("host", "")), reason)


def _where(facts: Facts) -> str:
    return (
        f"in phase {facts.get('phase')} of step {facts.get('step')} for {float(facts.get('time_in_phase_s', 0)):.0f} s"
    )


def _names(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {_list(ranks)}"


def _list(items: Sequence[object]) -> str:
    return ", ".join(map(str, items[:8])) + (", ..." if len(items) > 8 else "")
