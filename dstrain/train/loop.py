"""The one training loop: pretraining and fine-tuning differ only in what they hand to it.

A step reads: data, engine, counters, observers, and then, at the step boundary only, evaluation, save and stop. All decisions
use values that are the same on every rank. Knows no objective, no file format and no signal.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar

from dstrain.base.errors import DstrainError, NoProgressError
from dstrain.base.protocols import (
    Interrupted,
    Observer,
    Progress,
    RunState,
    StepData,
    StepFlags,
    StepReport,
    Unwatched,
)
from dstrain.data.ledger import LEDGER_MODULUS
from dstrain.health.guards import Guards, Verdict
from dstrain.train.engine import Engine, StepTotals

ResultT = TypeVar("ResultT")


class Ending(Enum):
    """Why the loop left."""

    COMPLETE = "complete"
    STOPPED = "stopped"
    ROLL_BACK = "roll_back"
    """The guards ask for an older state (`Guards.verdict.roll_back`): nothing was saved, and the observers stay open."""


@dataclass
class Boundary:
    """What happens between two steps; each action is collective and called with the steps done."""

    evaluate: Callable[[int], bool] | None = None
    """Returns whether this state is worth a checkpoint of its own (a new best); may raise `Interrupted` on all ranks."""
    save: Callable[[int], None] | None = None
    """Starts a save of the present state; what is written behind the training may fail later."""
    settle: Callable[[], bool] | None = None
    """Waits for the save in flight to end; whether it is published (True when none was in flight)."""
    evaluate_every: int | None = None
    save_every: int | None = None
    last_saved: int = -1
    progress: Progress = field(default_factory=Unwatched)
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, state: RunState, *, max_steps: int, flags: StepFlags) -> None:
        """Evaluate and save where this step or a flag asks for it; evaluation first, so that a save knows the newest metric.

        A stop takes the place of an evaluation that is due, except at the end of the run; a hurry also there.
        """
        step = state.step
        if flags.save_failed:
            self.settle_now(step)
        if self.evaluate is not None and (step == max_steps or _due(step, self.evaluate_every)):
            if flags.hurry or (flags.stop and step < max_steps):
                state.evaluation_due = True
            else:
                self.evaluate_now(state)
        if step == max_steps or _due(step, self.save_every) or flags.save_wanted or flags.stop or flags.hurry:
            self.save_now(step)

    def evaluate_now(self, state: RunState) -> None:
        """Evaluate this state and save it when it is the best; an interrupted evaluation stays due."""
        if self.evaluate is None:
            return
        state.evaluation_due = True
        with contextlib.suppress(Interrupted):
            best = self._timed("evaluate", self.evaluate, state.step)
            state.evaluation_due = False
            if best:
                self.save_now(state.step)

    def save_now(self, step: int) -> None:
        """Start a save unless this step is saved already."""
        if self.save is not None and self.last_saved != step:
            self._timed("save", self.save, step)
            self.last_saved = step

    def settle_now(self, step: int) -> None:
        """Wait for the save in flight; a failed one does not count as saved."""
        settle = self.settle
        if settle is not None and not self._timed("save", lambda _: settle(), step):
            self.last_saved = -1

    def _timed(self, part: str, action: Callable[[int], ResultT], step: int) -> ResultT:
        started = time.perf_counter()
        self.progress.enter(part, step)
        try:
            return action(step)
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started

    def take_seconds(self) -> dict[str, float]:
        """Seconds spent since the last call, by part."""
        taken, self.seconds = self.seconds, {}
        return taken


def train(
    *,
    engine: Engine,
    steps: Iterable[tuple[int, StepData]],
    state: RunState,
    max_steps: int,
    learning_rate: Callable[[int], float],
    observers: Sequence[Observer],
    boundary: Boundary,
    flags: Callable[[], StepFlags],
    guards: Guards,
    on_fault: Callable[[Verdict], None] | None = None,
    on_damage: Callable[[int, tuple[tuple[str, int], ...]], None] | None = None,
) -> Ending:
    """Collective. Run optimizer steps until `max_steps` or a stop that all ranks agree on; saves before it leaves.

    Args:
        engine: does a step.
        steps: (step, data) from `state.step` on; may raise `Interrupted` where this rank will not wait for data.
        state: the counters; advanced in place.
        max_steps: end of the run.
        learning_rate: of a step, from steps done.
        observers: look at every report.
        boundary: evaluation and saving between steps; its `progress` is told what the loop does.
        flags: what this rank asks for; read before each step.
        guards: judge each step before its update.
        on_fault: told, after the observers, of each step that was not sound; the same on every rank.
        on_damage: told of the steps done and of the blocks that some rank had to do without, the same on every rank.

    Raises:
        NoProgressError: the guards ask for a stop; nothing of the faulty steps was saved.
    """
    progress = boundary.progress
    if state.evaluation_due:
        boundary.evaluate_now(state)
        if state.evaluation_due:
            return _leave(Ending.STOPPED, state, observers, boundary)

    def judge(*, loss: float, gradient_norm: float, overflowed: bool) -> bool:
        verdict = guards.judge(state.step, loss=loss, gradient_norm=gradient_norm, overflowed=overflowed)
        return verdict.action == "go_on"

    clock = time.perf_counter()
    progress.enter("data", state.step)
    for step, data in _with_faults(steps, state.step):
        waited = time.perf_counter() - clock
        rate = learning_rate(step)
        progress.enter("step", step)
        try:
            totals = engine.train_step(data, step=step, learning_rate=rate, flags=flags(), judge=judge)
        except Interrupted:
            return _leave(Ending.STOPPED, state, observers, boundary)
        seconds = {"data": waited, "forward_backward": totals.forward_backward_s, "step": totals.step_s}
        seconds |= boundary.take_seconds()
        now = time.perf_counter()
        total = now - clock + seconds.get("save", 0.0) + seconds.get("evaluate", 0.0)
        seconds |= {"total": total, "other": max(0.0, total - sum(seconds.values()))}
        clock = now
        report = _report(step + 1, totals, rate, seconds)
        advance(state, report)
        for observer in observers:
            observer.on_step(state, report)
        if totals.damaged and on_damage is not None:
            on_damage(state.step, totals.damaged)
        verdict = guards.verdict
        if verdict.faults and on_fault is not None:
            on_fault(verdict)
        if verdict.action in ("roll_back", "stop"):
            boundary.settle_now(state.step)
            if verdict.action == "roll_back":
                return Ending.ROLL_BACK
            raise NoProgressError(
                f"step {state.step}: {verdict.reason}: lower optimizer.learning_rate, lengthen schedule.warmup_steps, "
                "use engine.precision: fp32, or loosen train.guards"
            )
        boundary.run(state, max_steps=max_steps, flags=totals.flags)
        if state.evaluation_due or (state.step < max_steps and (totals.flags.stop or totals.flags.hurry)):
            return _leave(Ending.STOPPED, state, observers, boundary)
        progress.enter("data", state.step)
        clock = time.perf_counter()
    return _leave(Ending.COMPLETE, state, observers, boundary)


def advance(state: RunState, report: StepReport) -> None:
    """Move the counters by one step."""
    state.step = report.step
    state.rows += report.num_rows
    state.tokens += report.num_tokens
    state.ledger = (state.ledger + report.ledger) % LEDGER_MODULUS
    state.skipped_steps += int(not report.applied)
    state.compute_seconds += report.seconds.get("total", 0.0)


def _with_faults(
    steps: Iterable[tuple[int, StepData]], first_step: int
) -> Iterator[tuple[int, StepData | DstrainError | Interrupted]]:
    """The steps; a rank's data fault or early leave is handed on like data, so that the ranks can agree on it."""
    step = first_step
    try:
        for step, data in steps:
            yield step, data
            step += 1
    except (DstrainError, Interrupted) as error:
        yield step, error


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _leave(ending: Ending, state: RunState, observers: Sequence[Observer], boundary: Boundary) -> Ending:
    """Save what is not saved yet, wait until it is on disk, and let the observers know."""
    boundary.save_now(state.step)
    boundary.settle_now(state.step)
    for observer in observers:
        observer.on_end(state)
    return ending


def _report(step: int, totals: StepTotals, rate: float, seconds: Mapping[str, float]) -> StepReport:
    return StepReport(
        step=step,
        loss=totals.loss,
        accuracy=totals.accuracy,
        gradient_norm=totals.gradient_norm,
        learning_rate=rate,
        applied=totals.applied,
        num_tokens=totals.num_tokens,
        num_targets=totals.num_targets,
        num_rows=totals.num_rows,
        padded_tokens=totals.padded_tokens,
        ledger=totals.ledger,
        epoch=totals.epoch,
        seconds=seconds,
        forward_s=totals.forward_s,
    )
