"""What stands around a run while it works: the stop request and its watch, the lease, the watchdog, the account of its time.

Opened before the processes join and closed after they have left, whatever happens in between; the run and its loop see
one object. Decides nothing by itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from dstrain.base.control import ControlPlane
from dstrain.base.errors import ExitCode
from dstrain.base.protocols import RunState, StepReport
from dstrain.base.world import World
from dstrain.health.heartbeat import Heartbeat
from dstrain.health.lease import RunLease
from dstrain.health.signals import StopRequest
from dstrain.health.stop_config import StopConfig, tokens_spent, training_spent
from dstrain.health.stop_relay import StopRelay
from dstrain.health.stop_watch import StopWatch
from dstrain.monitor.goodput_meter import GoodputMeter, read_attempts
from dstrain.stages.assembly import AnyConfig
from dstrain.stages.saving import Past

_FIRST_STEPS = 1  # of a process: it builds kernels, buffers and connections, and is no measure for the others


@dataclass
class Oversight:
    """One rank's share; an observer of the steps and the loop's `Progress`."""

    stop: StopRequest
    lease: RunLease
    heartbeat: Heartbeat
    goodput: GoodputMeter
    limits: StopConfig
    run_folder: Path
    relay: StopRelay | None = None
    """Once the ranks have met: carries a stop request to those that wait."""
    phase: str = "start_up"
    """What the rank is doing."""
    step: int = 0
    """Optimizer steps done when the phase began."""
    steps_taken: int = 0
    """By this process."""

    def enter(self, phase: str, step: int) -> None:
        """A phase begins; the first steps of a process are told apart."""
        self.phase, self.step = phase, step
        if phase == "step" and self.steps_taken < _FIRST_STEPS:
            phase = "first_step"
        self.heartbeat.enter(phase, step)

    def should_leave(self) -> bool:
        """Whether this rank, which waits for something, should stop waiting: it or another was asked to stop."""
        return self.stop.reason is not None if self.relay is None else self.relay.should_leave()

    def why(self) -> str:
        """Why the run stops, for people."""
        return self.stop.reason or "asked on another rank"

    def code_of_a_stop(self, control: ControlPlane) -> ExitCode:
        """Collective. How to end when everything is saved: whether to be started again by itself is agreed."""
        return ExitCode.SAVED_REQUEUE if control.all_true(self.stop.requeue) else ExitCode.SAVED_END

    def where(self) -> str:
        """Phase and step, for messages."""
        return f"in phase {self.phase} of step {self.step}"

    def past(self) -> Past:
        """Earlier attempts of this run, as far as they are on record."""
        ended = [attempt.outcome for attempt in read_attempts(self.run_folder)[:-1]]
        failures = sum(outcome not in ("complete", "saved") for outcome in ended)
        return Past(failures, self.goodput.total().wall_s / 3600)

    def on_step(self, state: RunState, report: StepReport) -> None:
        """Stop when the budget of tokens, or of hours in steps, is used up."""
        self.steps_taken += 1
        reason = tokens_spent(self.limits, state.tokens) or training_spent(self.limits, state.compute_seconds)
        if reason is not None:
            self.stop.ask(reason, requeue=False)

    def on_end(self, state: RunState) -> None:
        """Nothing to close here: `watched_over` closes."""


@contextmanager
def limits_watched(oversight: Oversight, config: AnyConfig, world: World) -> Iterator[None]:
    """While the block runs, rank 0 looks for stop files, the end of the SLURM job and budgets."""
    with ExitStack() as stack:
        if world.is_first:
            watch = StopWatch(
                oversight.stop, config.stop, config.run_folder, num_devices=world.size, started=time.monotonic(),
                earlier_device_s=oversight.goodput.total().wall_s * world.size,
                tell=oversight.relay.tell if oversight.relay is not None else None,
            )  # fmt: skip
            stack.enter_context(watch)
        yield
