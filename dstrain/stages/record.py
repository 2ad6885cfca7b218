"""What a run folder says about its own data: checkpoints that are there, ledgers that were written, blocks that were closed.

Reads manifests and events only; opens no tensor and no shard. The rebuilt data is compared with this in `stages.audit`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.base.errors import CheckpointError, ConfigError
from dstrain.checkpoint.layout import checkpoints_folder, published_steps
from dstrain.checkpoint.manifest import CheckpointManifest
from dstrain.checkpoint.reader import Checkpoint
from dstrain.data.ledger import LEDGER_MODULUS
from dstrain.monitor.events import current_curve, read_events

EVENTS = "events.jsonl"


@dataclass(frozen=True)
class LedgerPoint:
    """What was written about the data after some step."""

    step: int
    """Optimizer steps done; the step just done, counted from 1."""
    where: str
    """The file and event, for messages."""
    of_step: int | None = None
    """Ledger of that step alone."""
    total: int | None = None
    """Ledger of all steps so far."""
    rows: int | None = None
    """Rows of all steps so far."""


@dataclass(frozen=True)
class RunRecord:
    """Everything a run wrote about its data."""

    folder: Path
    newest: CheckpointManifest | None
    """The newest checkpoint that pins the data of the steps in question."""
    points: tuple[LedgerPoint, ...]
    """By step; one step may have several, from events and from checkpoints."""
    closed: tuple[tuple[str, int, int], ...]
    """(source, block, steps done before the one that met the damage), from events: what a rank drops at once, and all ranks
    a few steps later."""
    worlds: tuple[tuple[int, int], ...]
    """(first step, ranks) each time the run was started."""
    damaged: tuple[str, ...] = ()
    """Checkpoints that are not whole, with the reason."""

    @property
    def last_step(self) -> int:
        """The last step that left any trace."""
        return max([p.step for p in self.points] + [self.newest.step if self.newest else 0])


def read_record(folder: Path, *, until: int | None = None) -> RunRecord:
    """Read what a run left behind.

    Args:
        folder: the run folder.
        until: leave out what was written after this step.

    Raises:
        ConfigError: the run has left neither a checkpoint nor an event to compare with.
    """
    limit = 1 << 62 if until is None else until
    manifests, damaged = _manifests(folder)
    events = _current(read_events(folder / EVENTS)) if (folder / EVENTS).is_file() else []
    kept = [m for m in manifests if m.step <= limit]
    points = [*_event_points(events), *(_checkpoint_point(m) for m in kept)]
    points = sorted((p for p in points if p.step <= limit), key=lambda p: p.step)
    if not points and not manifests:
        raise ConfigError(f"{folder}: has neither a checkpoint nor a logged step, so there is nothing to compare with")
    started = [e for e in events if e["event"] in ("started", "resumed")]
    closed = [(str(e["source"]), int(e["block"]), int(e["step"]) - 1) for e in events if e["event"] == "damaged_block"]
    return RunRecord(
        folder=folder,
        newest=next(iter(kept or manifests), None),
        points=tuple(points),
        closed=tuple(closed),
        worlds=tuple((int(e.get("step", 0)), int(e.get("world", 1))) for e in started),
        damaged=damaged,
    )


def _manifests(folder: Path) -> tuple[list[CheckpointManifest], tuple[str, ...]]:
    """Manifests of whole checkpoints (by size, not by hash), newest first, and what is wrong with the others."""
    found, damaged = [], []
    for step, path in published_steps(checkpoints_folder(folder)):
        try:
            manifest = Checkpoint(path).manifest
            if manifest.step != step:
                raise CheckpointError(f"{path}: holds step {manifest.step}")
            found.append(manifest)
        except CheckpointError as error:
            damaged.append(str(error))
    return found, tuple(damaged)


def _current(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Events without what a later resume took back; saves and endings are points of the ledger's curve, too."""
    marked = [{**e, "event": "step", "kind": e["event"]} if e["event"] in ("saved", "ended") else e for e in events]
    return [{**e, "event": e.get("kind", e["event"])} for e in current_curve(marked)]


def _event_points(events: Iterable[Mapping[str, Any]]) -> list[LedgerPoint]:
    points = []
    for event in events:
        step, kind = event.get("step"), event.get("event")
        if isinstance(step, int) and step > 0 and kind in ("step", "saved", "ended") and "ledger" in event:
            points.append(
                LedgerPoint(
                    step=step,
                    where=f"{EVENTS}, event {kind!r} of step {step}",
                    of_step=_number(event.get("step_ledger")),
                    total=_number(event["ledger"]),
                    rows=_number(event.get("rows")),
                )
            )
    return points


def _checkpoint_point(manifest: CheckpointManifest) -> LedgerPoint:
    return LedgerPoint(
        step=manifest.step,
        where=f"checkpoint step-{manifest.step:08d}",
        total=_number(manifest.state.get("ledger")),
        rows=_number(manifest.state.get("rows")),
    )


def _number(value: Any) -> int | None:
    """A ledger as written (text, because JSON readers round big numbers); -1 for what is none, which equals nothing."""
    if value is None:
        return None
    try:
        return int(value)
    except (TypeError, ValueError):
        return -1


def contradictions(points: Sequence[LedgerPoint]) -> list[str]:
    """Where what was written does not agree with itself; nothing is recomputed.

    Two records of one step must say the same, and of two neighbouring steps the totals must differ by the later one's own
    ledger.
    """
    problems: list[str] = []
    before: LedgerPoint | None = None
    for point in points:
        if before is not None and before.total is not None and point.total is not None:
            if point.step == before.step and point.total != before.total:
                problems.append(
                    f"step {point.step}: {point.where} says ledger {point.total}, {before.where} {before.total}"
                )
            expected = None if point.of_step is None else (before.total + point.of_step) % LEDGER_MODULUS
            if point.step == before.step + 1 and expected is not None and expected != point.total:
                problems.append(
                    f"step {point.step}: {point.where}: its own ledger {point.of_step} does not lead from the total "
                    f"of step {before.step} to its total"
                )
        if before is None or point.step != before.step or before.total is None:
            before = point
    return problems
