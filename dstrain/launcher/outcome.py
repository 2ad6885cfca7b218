"""How an attempt ended, from what its ranks left in `exit/` and the launcher's own code; launchers lose codes, files do not.

Reads and judges; decides nothing: what follows from it is the policy's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.base.errors import DataError, ExitCode
from dstrain.base.storage import read_json
from dstrain.health.outcomes import FOLDER
from dstrain.health.signals import LAUNCHER_GONE

_LIMIT_BYTES = 1 << 20
_WEIGHT = (
    ExitCode.RUN_IN_USE, ExitCode.USAGE, ExitCode.BAD_INPUT, ExitCode.NOTHING_TO_RESUME, ExitCode.NO_PROGRESS,
    ExitCode.UNHEALTHY_NODE,
)  # fmt: skip
"""Codes that one rank's word is enough for, the strongest first. Crashes and passing faults come after a missing rank."""
GRACEFUL = frozenset({ExitCode.COMPLETE, ExitCode.SAVED_REQUEUE, ExitCode.SAVED_END})
"""How a rank ends whose others need not be ended."""


@dataclass(frozen=True)
class RankExit:
    """What one rank left."""

    rank: int
    code: ExitCode
    cause: str
    step: int | None
    host: str
    world_size: int
    kind: str = ""
    """`health.outcomes.Kind`."""


@dataclass(frozen=True)
class Outcome:
    """How the whole attempt ended."""

    code: ExitCode | None
    """None: ranks were killed, or ended without a word."""
    cause: str
    ranks: tuple[int, ...] = ()
    """Those it is about."""
    hosts: tuple[str, ...] = ()
    """Where these ran, as far as known."""
    deliberate: bool = True
    """For SAVED_REQUEUE: a limit or a person wanted it; false after a signal that only ranks got, or a lost launcher."""


def read_exits(run_folder: Path) -> tuple[RankExit, ...]:
    """The ranks' words, in rank order; files that cannot be read count as not written."""
    found: dict[int, RankExit] = {}
    for path in sorted((run_folder / FOLDER).glob("rank-*.json")):
        try:
            left = _rank_exit(read_json(path, limit_bytes=_LIMIT_BYTES))
        except (DataError, ValueError, TypeError, KeyError):
            continue
        found[left.rank] = left
    return tuple(found[rank] for rank in sorted(found))


def judge(
    exits: Sequence[RankExit], *, launcher_code: int, expected: bool, signals_are_requests: bool = False
) -> Outcome:
    """One outcome for all ranks.

    Args:
        exits: of this attempt only.
        launcher_code: 0 to 255; believed only where ranks say nothing.
        expected: whether this stage leaves exit files; then a launcher's 0 without any is not believed.
        signals_are_requests: whether a signal that only ranks got was meant; SLURM speaks to job steps that way.
    """
    if not exits:
        return _without_files(launcher_code, expected=expected)
    if found := _first_said(exits, _WEIGHT):
        return found
    world = max(left.world_size for left in exits)
    silent = tuple(sorted(set(range(world)) - {left.rank for left in exits}))
    if silent:
        shown = ", ".join(map(str, silent[:8])) + (", ..." if len(silent) > 8 else "")
        others = next((f"; rank {left.rank} said: {left.cause}" for left in exits if left.code not in GRACEFUL), "")
        return Outcome(None, f"rank {shown} ended without a word (killed, or out of memory){others}", silent)
    if found := _first_said(exits, (ExitCode.RETRY_HERE, ExitCode.DEFECT)):
        return found
    for code in (ExitCode.SAVED_END, ExitCode.SAVED_REQUEUE):
        if said := [left for left in exits if left.code is code]:
            return _saved(code, said, signals_are_requests=signals_are_requests)
    return Outcome(ExitCode.COMPLETE, "complete")


def _first_said(exits: Sequence[RankExit], codes: Sequence[ExitCode]) -> Outcome | None:
    """The first of the codes that a rank gives for a fault of its own; else one that ranks give for another's."""
    for words in ([left for left in exits if left.kind != "peer"], exits):
        for code in codes:
            if said := [left for left in words if left.code is code]:
                return _outcome(code, said)
    return None


def _saved(code: ExitCode, said: Sequence[RankExit], *, signals_are_requests: bool) -> Outcome:
    """A stop that was obeyed; ranks that only joined in give the code's name, or nothing, as their cause."""
    causes = {left.cause for left in said} - {code.name.lower(), "complete", ""}
    stray = LAUNCHER_GONE in causes or (not signals_are_requests and any(cause.startswith("SIG") for cause in causes))
    return Outcome(code, ", ".join(sorted(causes)) or "asked to stop", deliberate=not stray)


def _without_files(launcher_code: int, *, expected: bool) -> Outcome:
    known = {int(code) for code in ExitCode}
    if launcher_code in known and (launcher_code != 0 or not expected):
        return Outcome(ExitCode(launcher_code), f"the launcher ended with {launcher_code}, no rank left a word")
    return Outcome(None, f"no rank left a word; the launcher ended with {launcher_code}")


def _outcome(code: ExitCode, said: Sequence[RankExit]) -> Outcome:
    ranks, hosts = tuple(left.rank for left in said), tuple(sorted({left.host for left in said if left.host}))
    return Outcome(code, said[0].cause, ranks, hosts)


def _rank_exit(data: Any) -> RankExit:
    step = data["step"]
    return RankExit(
        rank=int(data["rank"]),
        code=ExitCode(data["code"]),
        cause=str(data["cause"]),
        step=None if step is None else int(step),
        host=str(data.get("host", "")),
        world_size=int(data["world_size"]),
        kind=str(data.get("kind", "")),
    )
