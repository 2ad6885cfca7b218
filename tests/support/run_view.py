"""What a run folder shows from outside of the attempt that is about to start: facts to wait for, never a pause."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.runs import step_events


class RunView:
    """What a run folder shows of the attempt that is about to start."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._described = self._stamp("environment.json")
        self._events = self._count()
        self.first_step = max(step_events(run), default=0)
        self._staged = set(self._staging())

    def is_described(self) -> bool:
        """The run has said what it is; now the engine is built and filled."""
        return self._stamp("environment.json") != self._described

    def is_open(self) -> bool:
        """The loop is about to begin: an event of this attempt is there."""
        return self._count() > self._events

    def steps(self) -> int:
        """Steps of this attempt."""
        return max(step_events(self.run), default=0) - self.first_step

    def is_staging(self) -> bool:
        """A checkpoint of this attempt is being written."""
        return bool(set(self._staging()) - self._staged)

    def phase(self, pid: int, rank: int) -> tuple[str, float]:
        """What the rank's watchdog says: phase, and seconds in it; nothing of an earlier attempt."""
        try:
            facts = json.loads((self.run / "health" / f"rank-{rank:05d}.json").read_text())
        except (OSError, ValueError):
            return "", 0.0
        return (facts["phase"], facts["time_in_phase_s"]) if facts["pid"] == pid else ("", 0.0)

    def _stamp(self, name: str) -> int:
        try:
            return (self.run / name).stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def _count(self) -> int:
        try:
            return (self.run / "events.jsonl").read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def _staging(self) -> list[str]:
        folder = self.run / "checkpoints"
        return [p.name for p in folder.glob(".staging-*")] if folder.is_dir() else []
