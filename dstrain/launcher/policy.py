"""What follows when an attempt ends: stop with a code, or start again, where, when and from which checkpoint. Pure.

Every restart is counted and bounded, so a job always ends. Progress is a newer checkpoint, or a step that no attempt reached
before. Ends without progress are counted in a row; before the last one that is tolerated the newest checkpoint is set aside,
in case it is what makes the run fail.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pydantic import Field

from dstrain.base.config import Config
from dstrain.base.errors import ExitCode
from dstrain.base.seeds import derive
from dstrain.launcher.hosts import Host, num_processes, without
from dstrain.launcher.outcome import Outcome

FINAL = frozenset(
    {
        ExitCode.USAGE, ExitCode.BAD_INPUT, ExitCode.NO_PROGRESS, ExitCode.RUN_IN_USE, ExitCode.NOTHING_TO_RESUME,
        ExitCode.SAVED_END,
    }
)  # fmt: skip
"""Starting again unchanged would end the same way."""


class RestartPolicy(Config):
    """When a job is started again, and how long things may take."""

    max_restarts: int = Field(default=10, ge=0)
    """Restarts over the life of this supervisor, whatever their reason."""
    min_processes: int | None = Field(default=None, ge=1)
    """Fewest ranks the job may shrink to when unhealthy hosts are left out; None: it does not shrink."""
    idle_limit: int = Field(default=3, ge=1)
    """Ends without progress in a row after which the job is given up with code 79."""
    unhealthy_retries: int = Field(default=1, ge=0)
    """Restarts on an unhealthy machine where no other is left; a driver may recover once."""
    first_wait_s: float = Field(default=1.0, ge=0.0)
    """Seconds before a restart that follows progress; doubled for each end without."""
    longest_wait_s: float = Field(default=300.0, ge=0.0)
    """Cap of the doubling, in seconds."""
    grace_s: float = Field(default=120.0, ge=0.0)
    """Seconds the ranks have to save and leave once asked; then they are killed."""
    hurry_grace_s: float = Field(default=10.0, ge=0.0)
    """Seconds left to them after a second request."""
    peer_grace_s: float = Field(default=15.0, ge=0.0)
    """Seconds the other ranks have to leave by themselves once one has died; launchers would take 30 s a rank."""


@dataclass(frozen=True)
class Standing:
    """What is known before an attempt."""

    hosts: tuple[Host, ...] = ()
    best_checkpoint: int = -1
    """Newest checkpoint ever seen, by step; -1 for none."""
    best_step: int = -1
    """Highest step ever reached."""
    restarts: int = 0
    idle: int = 0
    unhealthy: int = 0
    stepped_back: bool = False


@dataclass(frozen=True)
class Ended:
    """What is known after it."""

    outcome: Outcome
    checkpoint: int
    """Step of the newest checkpoint now; -1 for none."""
    num_checkpoints: int
    reached: int
    """Highest step reached; -1 for none."""
    asked: bool = False
    """The supervisor itself was asked to stop."""


@dataclass(frozen=True)
class Decision:
    """Stop with `code`, or start again after `wait_s`."""

    why: str
    code: ExitCode | None = None
    wait_s: float = 0.0
    step_back: bool = False
    """Set the newest checkpoint aside first."""


def decide(policy: RestartPolicy, standing: Standing, ended: Ended, *, seed: int) -> tuple[Standing, Decision]:
    """The next standing and what to do.

    Args:
        policy: limits and times.
        standing: before the attempt.
        ended: after it.
        seed: of the run; the jitter of the wait follows from it and the number of restarts.
    """
    outcome = ended.outcome
    if (final := _final(ended)) is not None:
        return standing, final
    progressed = (
        ended.checkpoint > standing.best_checkpoint
        or ended.reached > standing.best_step
        or outcome.code is ExitCode.SAVED_REQUEUE
    )
    after = replace(
        standing,
        best_checkpoint=max(standing.best_checkpoint, ended.checkpoint),
        best_step=max(standing.best_step, ended.reached),
        idle=0 if progressed else standing.idle + 1,
        stepped_back=standing.stepped_back and not progressed,
    )
    if after.idle >= policy.idle_limit:
        return after, Decision(f"{after.idle} ends in a row without progress: {outcome.cause}", ExitCode.NO_PROGRESS)
    if after.restarts >= policy.max_restarts:
        code = outcome.code or ExitCode.RETRY_HERE
        return after, Decision(f"{after.restarts} restarts are used up (--max-restarts): {outcome.cause}", code)
    after = replace(after, restarts=after.restarts + 1)
    if outcome.code is ExitCode.UNHEALTHY_NODE:
        return _leave_out(policy, after, ended, seed=seed)
    return _again(policy, after, ended, seed=seed)


def _final(ended: Ended) -> Decision | None:
    outcome = ended.outcome
    if outcome.code is ExitCode.COMPLETE:
        return Decision("complete", ExitCode.COMPLETE)
    if outcome.code in FINAL:
        return Decision(outcome.cause, outcome.code)
    if outcome.code is ExitCode.SAVED_REQUEUE and (ended.asked or outcome.deliberate):
        return Decision(f"stopped and saved ({outcome.cause})", ExitCode.SAVED_REQUEUE)
    if ended.asked:
        lost = ended.reached - max(ended.checkpoint, 0)
        if lost <= 0:
            return Decision("stopped; nothing was unsaved", ExitCode.SAVED_REQUEUE)
        return Decision(
            f"stopped, {lost} steps behind the newest checkpoint are lost: {outcome.cause}", ExitCode.RETRY_HERE
        )
    return None


def _leave_out(policy: RestartPolicy, after: Standing, ended: Ended, *, seed: int) -> tuple[Standing, Decision]:
    outcome = ended.outcome
    left = without(after.hosts, outcome.hosts)
    enough = policy.min_processes is not None and num_processes(left) >= policy.min_processes
    if left and len(left) < len(after.hosts) and enough:
        names = ", ".join(outcome.hosts)
        why = f"going on without {names}, with {num_processes(left)} ranks: {outcome.cause}"
        return replace(after, hosts=left), Decision(why, wait_s=_wait(policy, after, seed))
    if after.unhealthy < policy.unhealthy_retries:
        return _again(policy, replace(after, unhealthy=after.unhealthy + 1), ended, seed=seed)
    limit = "" if policy.min_processes is None else f", and {num_processes(left)} ranks elsewhere are too few"
    return after, Decision(f"unhealthy machine{limit}: {outcome.cause}", ExitCode.UNHEALTHY_NODE)


def _again(policy: RestartPolicy, after: Standing, ended: Ended, *, seed: int) -> tuple[Standing, Decision]:
    # The last end that is tolerated: if the newest checkpoint is what makes the run fail, only an older one can tell.
    step_back = after.idle == policy.idle_limit - 1 and after.idle > 0 and ended.num_checkpoints > 1
    step_back = step_back and not after.stepped_back
    after = replace(after, stepped_back=after.stepped_back or step_back)
    return after, Decision(ended.outcome.cause, wait_s=_wait(policy, after, seed), step_back=step_back)


def _wait(policy: RestartPolicy, after: Standing, seed: int) -> float:
    """Exponential in the ends without progress, between half and one and a half of it, so that many jobs do not march in step."""
    full = min(policy.longest_wait_s, policy.first_wait_s * 2.0**after.idle)
    return full * (0.5 + derive(seed, "restart", after.restarts) / 2.0**64)
