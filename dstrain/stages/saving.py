"""A run's checkpoints: when one is due, what goes into it, and what becomes of a save that ends behind the training.

Joins the writer, the schedule and the stop request. A save that fails is an event and the next one tries again; only another
owner of the run folder ends the run. Does not know the loop; the loop's boundary calls `start` and `settle`.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dstrain.base.control import ControlPlane
from dstrain.base.errors import ExitCode
from dstrain.base.logs import get_logger
from dstrain.base.protocols import RunState, ShouldLeave, StepReport, never
from dstrain.checkpoint.layout import checkpoints_folder, step_folder
from dstrain.checkpoint.manifest import Fragment
from dstrain.checkpoint.outcome import SaveOutcome
from dstrain.checkpoint.reader import Found, newest_valid
from dstrain.checkpoint.schedule import SaveSchedule
from dstrain.checkpoint.writer import CheckpointConfig, CheckpointWriter
from dstrain.health.lease import RunLease
from dstrain.health.signals import StopRequest
from dstrain.monitor.monitor import Monitor

_LOG = get_logger(__name__)
_LONGEST_OF = 16  # steps: what "the longest of the last steps" looks at


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a checkpoint is made of, asked for at the moment of a save."""

    fragments: Callable[[], Iterable[Fragment]]
    """This rank's share of the state."""
    manifest: Callable[[int], Mapping[str, Any]]
    """The manifest's fields for a step."""
    config_yaml: str
    tokenizer: Path | None


@dataclasses.dataclass(frozen=True)
class Past:
    """What the run has been through."""

    failures: int
    """Attempts that ended by a fault, a kill or a hang."""
    hours: float
    """Wall time so far."""


class Saving:
    """Saves one run's checkpoints; an observer of its steps."""

    def __init__(
        self, config: CheckpointConfig, *, run_folder: Path, control: ControlPlane, lease: RunLease, stop: StopRequest,
        should_leave: ShouldLeave = never,
    ) -> None:  # fmt: skip
        """Prepare; nothing is written.

        Args:
            config: the checkpoint section.
            run_folder: of the run.
            control: agreements between ranks.
            lease: asked by rank 0 right before a checkpoint is published.
            stop: is told what a step and a save take, and says whether a save still fits before a kill.
            should_leave: whether to raise `Interrupted` rather than wait for a mirror that does not answer.
        """
        self.writer = CheckpointWriter(
            checkpoints_folder(run_folder),
            config=config,
            control=control,
            check_owner=lease.check,
            should_leave=should_leave,
        )
        self._config, self._control, self._stop = config, control, stop
        self._step_seconds: deque[float] = deque(maxlen=_LONGEST_OF)
        self._durable_s = 0.0
        self._states: dict[int, RunState] = {}
        self.last_saved_step: int | None = None
        """Step of the newest checkpoint that is known to be on disk."""

    def open(self, contents: Contents, *, state: Callable[[], RunState], monitor: Monitor, past: Past) -> None:
        """Connect to the run that is to be saved.

        Args:
            contents: of a checkpoint.
            state: the counters as they are.
            monitor: is told of saves.
            past: of the run's earlier attempts, for the expected time between failures.
        """
        self._contents, self._state, self._monitor = contents, state, monitor
        self._schedule = SaveSchedule(
            self._config, devices=self._control.world.size, now_s=time.monotonic(),
            interruptions=past.failures, run_hours=past.hours,
        )  # fmt: skip

    def newest_valid(self) -> Found:
        """Rank 0. The newest whole checkpoint, copied back from the mirror where that has a newer one.

        Raises:
            StorageError: that copy cannot be written here.
        """
        return newest_valid(self.writer.folder, mirror=self.writer.mirror, trust_owner=self._config.trust_owner)

    @property
    def every_steps(self) -> int | None:
        """Fixed number of steps between saves, the same on every rank; None where rank 0's clock decides."""
        every = self._config.every_steps
        return every if isinstance(every, int) else None

    def is_wanted(self, step: int) -> bool:
        """Local: whether this rank asks for a save at the next boundary, by the clock or because a person asked."""
        by_clock = self._control.world.is_first and self.every_steps is None
        return self._stop.take_save_wish() or (by_clock and self._schedule.wants_save(step, time.monotonic()))

    def start(self, step: int) -> None:
        """Collective. Copy the state and write it behind the training, unless no save can finish before this job is killed."""
        self.settle()
        state = dataclasses.replace(self._state())
        if not self._control.all_true(self._stop.can_save(self._durable_s)):
            _LOG.error(
                "step %d is not saved: a save takes %.0f s and this job is killed before that; the checkpoint before stays",
                step, self._durable_s,
            )  # fmt: skip
            self._monitor.event("save_not_begun", step=step, needs_s=self._durable_s)
            return
        started = time.monotonic()
        self._states = {step: state}
        best = state.best_step
        self.writer.start(
            self._contents.fragments(), self._contents.manifest(step), config_yaml=self._contents.config_yaml,
            tokenizer=self._contents.tokenizer, protect=frozenset() if best is None else frozenset({best}),
        )  # fmt: skip
        now = time.monotonic()
        self._schedule.note_save(now - started, now_s=now)
        self.tell()

    def settle(self) -> bool:
        """Collective. Wait for the save in flight; whether there is none that failed.

        Raises:
            RunInUseError: another job owns the run by now.
        """
        outcome = self.writer.settle()
        if outcome is None:
            return True
        if outcome.first_seen:
            self._tell(outcome)
        if outcome.exit_code == ExitCode.RUN_IN_USE:
            raise outcome.fault()
        return not outcome.failed

    def tell(self) -> None:
        """Local, never waits: pass on what has ended since the last call."""
        while (outcome := self.writer.poll()) is not None:
            self._tell(outcome)
        for event in self.writer.take_events():
            self._monitor.event(event.pop("event"), **event)

    def failed(self) -> bool:
        """Local: whether the ranks should settle at the next boundary."""
        return self.writer.failed()

    def is_saved(self, step: int) -> bool:
        """Collective. Whether the checkpoint of a step is in its place."""
        return bool(self._control.from_first(step_folder(self.writer.folder, step).is_dir()))

    def on_step(self, state: RunState, report: StepReport) -> None:
        """Learn what a step takes."""
        seconds = report.seconds["total"] - report.seconds.get("save", 0.0) - report.seconds.get("evaluate", 0.0)
        self._step_seconds.append(seconds)
        self._schedule.note_step(seconds)
        self._stop.set_needs(step_s=max(self._step_seconds))

    def on_end(self, state: RunState) -> None:
        """Nothing is left to do: the loop has settled."""

    def _tell(self, outcome: SaveOutcome) -> None:
        if outcome.published is not None:
            self._durable_s = max(outcome.published.seconds["total"], 0.9 * self._durable_s)
            self._schedule.note_durable(outcome.published.seconds["total"])
            self._stop.set_needs(save_s=self._durable_s)
            self.last_saved_step = outcome.step
            state = self._states.get(outcome.step)
            if state is not None:
                self._monitor.saved(
                    state, seconds=outcome.published.seconds["total"], folder=outcome.published.folder.name
                )
        elif outcome.failed and not outcome.own_part:
            self._monitor.event("save_failed", step=outcome.step, error=outcome.error)
            if self._control.world.is_first:
                _LOG.error("%s; training goes on, the next save will try again", outcome.error)
