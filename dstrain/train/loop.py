"""The one training loop: pretraining and fine-tuning differ only in what they hand to it.

A step reads: data, engine, counters, observers, and then, at the step boundary only, evaluation, save and stop. All decisions
use values that are the same on every rank. Knows no objective, no file format and no signal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar

from dstrain.base.errors import DstrainError, NoProgressError
from dstrain.base.protocols import Observer, RunState, StepData, StepReport
from dstrain.data.ledger import LEDGER_MODULUS
from dstrain.train.engine import Engine, StepTotals

ResultT = TypeVar("ResultT")


class Ending(Enum):
    """Why the loop left."""

    COMPLETE = "complete"
    STOPPED = "stopped"


@dataclass
class Boundary:
    """What happens between two steps; each action is collective and called with the steps done."""

    evaluate: Callable[[int], bool] | None = None
    """Returns whether this state is worth a checkpoint of its own (a new best)."""
    save: Callable[[int], None] | None = None
    evaluate_every: int | None = None
    save_every: int | None = None
    last_saved: int = -1
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, step: int, *, max_steps: int) -> None:
        """Evaluate and save where this step asks for it; evaluation first, so that a save knows the newest metric."""
        if self.evaluate is not None and (step == max_steps or _due(step, self.evaluate_every)):
            if self._timed("evaluate", self.evaluate, step):
                self.save_now(step)
        if self.save is not None and (step == max_steps or _due(step, self.save_every)):
            self.save_now(step)

    def save_now(self, step: int) -> None:
        """Save unless this step is saved already."""
        if self.save is not None and self.last_saved != step:
            self._timed("save", self.save, step)
            self.last_saved = step

    def _timed(self, part: str, action: Callable[[int], ResultT], step: int) -> ResultT:
        started = time.perf_counter()
        result = action(step)
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started
        return result

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
    stop_requested: Callable[[], bool],
    skipped_limit: int,
    on_damage: Callable[[int, tuple[tuple[str, int], ...]], None] | None = None,
) -> Ending:
    """Collective. Run optimizer steps until `max_steps` or a stop that all ranks agree on; saves before it leaves.

    Args:
        engine: does a step.
        steps: (step, data) from `state.step` on.
        state: the counters; advanced in place.
        max_steps: end of the run.
        learning_rate: of a step, from steps done.
        observers: look at every report.
        boundary: evaluation and saving between steps.
        stop_requested: whether this rank was asked to stop.
        skipped_limit: consecutive skipped steps that end the run.
        on_damage: told of the steps done and of the blocks that some rank had to do without, the same on every rank.

    Raises:
        NoProgressError: too many steps in a row were skipped.
    """
    skipped_in_row = 0
    clock = time.perf_counter()
    for step, data in _with_faults(steps, state.step):
        waited = time.perf_counter() - clock
        rate = learning_rate(step)
        totals = engine.train_step(data, step=step, learning_rate=rate, stop_requested=stop_requested())
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
        skipped_in_row = 0 if report.applied or engine.precision == "fp16" else skipped_in_row + 1
        if skipped_in_row >= skipped_limit:
            raise NoProgressError(
                f"{skipped_in_row} steps in a row were skipped for non-finite gradients, the last at step {state.step}: "
                "lower optimizer.learning_rate, lengthen schedule.warmup_steps, or use engine.precision: fp32"
            )
        boundary.run(state.step, max_steps=max_steps)
        if totals.stop_requested and state.step < max_steps:
            boundary.save_now(state.step)
            return _leave(Ending.STOPPED, state, observers)
        clock = time.perf_counter()
    return _leave(Ending.COMPLETE, state, observers)


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
) -> Iterator[tuple[int, StepData | DstrainError]]:
    """The steps; a rank's data fault is handed on like data, so that the ranks can agree on it."""
    step = first_step
    try:
        for step, data in steps:
            yield step, data
            step += 1
    except DstrainError as error:
        yield step, error


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _leave(ending: Ending, state: RunState, observers: Sequence[Observer]) -> Ending:
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
    )
