"""Measures where this attempt's time goes and keeps the record of it in the run folder, `attempts/0001.json` and up.

The record is state, not a log: written whole by rank 0 at the start, every few seconds of training and at the end, and
read by the next attempt. Time is CLOCK_BOOTTIME, which no clock change moves, counted from the start of the process, so
imports are included. Best effort like all of this room: a record that cannot be written is counted and said once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from dstrain.base.errors import DstrainError
from dstrain.base.logs import get_logger
from dstrain.base.protocols import StepReport
from dstrain.base.storage import make_directory, read_json, write_json
from dstrain.monitor.goodput import BUCKETS, Attempt, Bucket, Goodput, Outcome, account

_log = get_logger(__name__)

_FOLDER = "attempts"
_RECORD_LIMIT_BYTES = 1 << 16
_OUTSIDE: Mapping[str, Bucket] = {"data": "data_wait", "evaluate": "evaluate", "save": "save_stall", "other": "other"}


@dataclass(frozen=True)
class Clock:
    """Where time comes from; tests hand in their own."""

    wall: Callable[[], float] = time.time
    """Unix seconds; may jump."""
    uptime: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME)
    """Seconds since the machine started; never jumps, goes on while it sleeps."""
    process_started: Callable[[], float] = lambda: _process_started()
    """`uptime` when this process began."""
    boot: Callable[[], str] = lambda: _boot_id()
    """Names this start of this machine."""


class GoodputMeter:
    """Keeps one attempt's record. Make it and `start` it after the run folder's lease is held, as early as possible.

    Args:
        run_folder: gets `attempts/`.
        active: whether this rank measures and writes: rank 0.
        clock: where time comes from.
        record_every_s: least seconds between two records while training.
    """

    def __init__(
        self, run_folder: Path, *, active: bool = True, clock: Clock | None = None, record_every_s: float = 10.0
    ) -> None:
        self.dropped = 0
        """Records that could not be written."""
        self._folder = run_folder / _FOLDER
        self._active = active
        self._clock = clock or Clock()
        self._every = record_every_s
        self._earlier: list[Attempt] = []
        self._record: Attempt | None = None
        self._seconds: dict[Bucket, float] = dict.fromkeys(BUCKETS, 0.0)
        self._claimed: dict[Bucket, float] = {}
        self._highest = 0
        self._begun_uptime = 0.0
        self._written_uptime = float("-inf")

    @property
    def is_started(self) -> bool:
        """Whether `start` was called."""
        return self._record is not None

    def start(self, resumed_step: int = 0) -> None:
        """Begin this attempt's record; calling it again only corrects the step resumed from.

        Args:
            resumed_step: optimizer steps done; 0 when a checkpoint has not been looked for yet.
        """
        if not self._active:
            return
        if self._record is None:
            self._earlier = read_attempts(self._folder.parent)
            self._highest = max((attempt.step for attempt in self._earlier), default=0)
            now = self._clock.uptime()
            self._begun_uptime = min(self._clock.process_started(), now)
            self._record = Attempt(
                number=max((attempt.number for attempt in self._earlier), default=0) + 1,
                started_at=self._clock.wall() - (now - self._begun_uptime),
                elapsed_s=now - self._begun_uptime,
                boot=self._clock.boot(),
                started_uptime_s=self._begun_uptime,
            )
        self._seconds["start_up"] += self._unaccounted()
        self._record = dataclasses.replace(self._record, resumed_step=resumed_step, step=resumed_step)
        self._write()

    def part(self, bucket: Bucket, seconds: float) -> None:
        """Count time spent outside of steps, e.g. `part("restore", 2.5)`; a later step report may name it again."""
        if self._record is None:
            return
        passed = self._unaccounted()
        seconds = min(max(0.0, seconds), passed)
        self._seconds[bucket] += seconds
        self._seconds[self._between] += passed - seconds
        self._claimed[bucket] = self._claimed.get(bucket, 0.0) + seconds

    def rest(self, bucket: Bucket) -> None:
        """Count all time that is in no bucket yet."""
        self.part(bucket, self._unaccounted())

    def step(self, report: StepReport) -> None:
        """Count the time since the last step; writes the record when one is due."""
        if self._record is None:
            return
        between = self._between
        replayed = report.step <= self._highest
        parts = self._step_parts(report, "replayed" if replayed else "productive")
        passed = self._unaccounted()
        named = sum(parts.values())
        scale = passed / named if named > passed else 1.0
        for bucket, seconds in parts.items():
            self._seconds[bucket] += seconds * scale
        self._seconds[between] += max(0.0, passed - named)
        self._claimed.clear()
        self._highest = max(self._highest, report.step)
        self._record = dataclasses.replace(
            self._record,
            step=max(self._record.step, report.step),
            replayed_steps=self._record.replayed_steps + int(replayed),
        )
        if self._clock.uptime() - self._written_uptime >= self._every:
            self._write()

    def end(self, outcome: Outcome) -> None:
        """Write how the attempt ended; may be called again when more is known."""
        if self._record is not None:
            self._record = dataclasses.replace(self._record, outcome=outcome)
            self._write()

    def total(self) -> Goodput:
        """The run's goodput up to now, earlier attempts included."""
        if self._record is None:
            return account(self._earlier)
        return account([*self._earlier, self._now()])

    @property
    def _between(self) -> Bucket:
        """Where time belongs that nobody names."""
        is_stepping = self._record is not None and self._record.step > self._record.resumed_step
        return "other" if is_stepping else "start_up"

    def _step_parts(self, report: StepReport, work: Bucket) -> dict[Bucket, float]:
        parts: dict[Bucket, float] = {}
        for name, seconds in report.seconds.items():
            if name != "total":
                bucket = _OUTSIDE.get(name, work)
                parts[bucket] = parts.get(bucket, 0.0) + max(0.0, seconds)
        return {bucket: max(0.0, seconds - self._claimed.get(bucket, 0.0)) for bucket, seconds in parts.items()}

    def _unaccounted(self) -> float:
        """Seconds since the start that are in no bucket yet."""
        return max(0.0, self._clock.uptime() - self._begun_uptime - sum(self._seconds.values()))

    def _now(self) -> Attempt:
        assert self._record is not None
        seconds: dict[str, float] = {str(bucket): spent for bucket, spent in self._seconds.items()}
        return dataclasses.replace(self._record, elapsed_s=self._clock.uptime() - self._begun_uptime, seconds=seconds)

    def _write(self) -> None:
        self._written_uptime = self._clock.uptime()
        record = self._now()
        try:
            make_directory(self._folder)
            write_json(self._folder / f"{record.number:04d}.json", dataclasses.asdict(record))
        except (DstrainError, OSError) as error:
            self.dropped += 1
            if self.dropped == 1:
                _log.warning("%s: the account of this run's time is not written: %s", self._folder, error)


def read_attempts(run_folder: Path) -> list[Attempt]:
    """The records of a run's attempts in order; what is missing or damaged is left out."""
    found = []
    try:
        paths = sorted((run_folder / _FOLDER).glob("[0-9]*.json"))
    except OSError:
        return []
    for path in paths:
        try:
            found.append(_attempt(read_json(path, limit_bytes=_RECORD_LIMIT_BYTES)))
        except (DstrainError, OSError, TypeError, ValueError, KeyError, AttributeError):
            continue
    return sorted(found, key=lambda attempt: attempt.number)


def note_end(run_folder: Path, outcome: Outcome, *, ended_at: float | None = None) -> None:
    """Complete the last attempt's record when its process could not: for who ended it or starts the next one.

    Args:
        run_folder: of the run.
        outcome: e.g. "hang"; an outcome that the attempt wrote itself is kept.
        ended_at: Unix time of the end; None when it is not known.

    Raises:
        StorageError: the record cannot be written.
    """
    attempts = read_attempts(run_folder)
    if attempts and attempts[-1].outcome is None:
        last = attempts[-1]
        ended_s = None if ended_at is None else max(last.elapsed_s, ended_at - last.started_at)
        changed = dataclasses.replace(last, outcome=outcome, ended_s=ended_s)
        write_json(run_folder / _FOLDER / f"{last.number:04d}.json", dataclasses.asdict(changed))


def _attempt(data: Any) -> Attempt:
    known = {field.name: data[field.name] for field in dataclasses.fields(Attempt) if field.name in data}
    numbers = [known[name] for name in ("started_at", "elapsed_s", "started_uptime_s") if name in known]
    numbers += [*known.get("seconds", {}).values(), *([known["ended_s"]] if known.get("ended_s") is not None else [])]
    if not all(isinstance(n, (int, float)) and abs(n) < 1e12 for n in numbers):
        raise ValueError(f"not a record of seconds: {json.dumps(known)[:200]}")
    if not all(isinstance(known.get(name, 0), int) for name in ("number", "step", "resumed_step", "replayed_steps")):
        raise ValueError("a count is not a whole number")
    if known.get("outcome") not in (None, *get_args(Outcome)):
        raise ValueError(f"unknown outcome {known['outcome']!r}")
    return Attempt(**known)


def _process_started() -> float:
    """Uptime at which this process began, from the kernel; now when it cannot be read."""
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    try:
        # Field 22, in clock ticks since boot; the name in field 2 may hold spaces and brackets.
        ticks = int(Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()[19])
        started = ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return now
    return started if 0 <= now - started < 86_400 * 365 else now


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
