"""Stop requests: one object that collects the reasons to stop and answers the loop's question without any I/O.

SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 ask for "save and leave". A second signal says hurry; as launchers forward what the
process group has got already, signals within a second of the first count as one. SIGINT when it was said already raises
KeyboardInterrupt, for a person who has had enough. SIGCONT, which SLURM sends first, is ignored. A rank whose launcher
has died asks for the same stop, because DeepSpeed's launcher leaves its ranks as orphans when it is killed. Limits (the
end of the SLURM job, budgets) are given as instants; files are watched by `stop_watch`, which then asks here.

Handlers only set fields, and only in the process that installed them: a forked child that inherits them does nothing.
Imports nothing heavy, so that the handlers can be in place before torch is imported; decides for one rank only: the
ranks agree in the training loop.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any

from dstrain.health.stop_deadline import Limit, Needs, latest_request

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
ONE_BURST_S = 1.0
"""Signals that follow one another faster are one request, sent on by several."""
LAUNCHER_GONE = "the launcher is gone"


def ignore_stop_signals() -> None:
    """For a child process (a loader worker): leave stop signals, which reach the whole group, to the parent.

    The parent ends such a child by closing its queue, or with SIGKILL; `terminate()` has no effect on it any more.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopRequest:
    """Collects the reasons to stop; use as a context manager around a run, so that old handlers come back."""

    def __init__(self, *, watch_parent: bool = False) -> None:
        """Start with no reason.

        Args:
            watch_parent: treat the death of the parent process (a launcher) as a stop request.
        """
        self._pid = os.getpid()
        self._parent = os.getppid() if watch_parent else None
        self._reason: str | None = None
        self._requeue = True
        self._hurry = False
        self._save_wanted = False
        self._signals_begun: float | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._limits: Mapping[str, Limit] = {}
        self._needs = Needs()
        self._grace_s: float | None = None
        self._terminated_at: float | None = None
        self.signal: str | None = None
        """Name of the first stop signal that came."""

    @property
    def reason(self) -> str | None:
        """Why this rank should stop, or None."""
        if self._reason is None:
            if self._parent is not None and os.getppid() != self._parent:
                self.ask(LAUNCHER_GONE)
            elif self._limits:
                now = time.monotonic()
                for limit in self._limits.values():
                    if now >= latest_request(limit, self._needs):
                        self.ask(limit.reason, requeue=limit.requeue)
        return self._reason

    @property
    def requeue(self) -> bool:
        """Whether the run may be started again by itself; false after a kill switch or a spent budget of the whole run."""
        return self._requeue

    @property
    def hurry(self) -> bool:
        """Whether nothing but saving should be done: asked twice, or hardly more time is left than that takes."""
        left = self.grace_left_s()
        return self._hurry or (left is not None and self.reason is not None and self._needs.is_short(left))

    def take_save_wish(self) -> bool:
        """Whether a save was asked for since the last call; the training goes on after it."""
        wanted, self._save_wanted = self._save_wanted, False
        return wanted

    def grace_left_s(self) -> float | None:
        """Seconds until this process will be killed, negative when that is overdue; None when no end is known."""
        end = min((limit.at for limit in self._limits.values() if limit.kills), default=math.inf)
        if self._grace_s is not None and self._terminated_at is not None:
            end = min(end, self._terminated_at + self._grace_s)
        return None if end == math.inf else end - time.monotonic()

    def can_save(self, save_cost_s: float) -> bool:
        """Whether a save of that many seconds can still finish; without a known end it is worth the try."""
        left = self.grace_left_s()
        return left is None or left >= save_cost_s

    def ask(self, reason: str, *, requeue: bool = True) -> None:
        """Ask for a stop from inside the program; the first reason stays.

        Args:
            reason: for people, and for the exit file.
            requeue: whether the run may then be started again by itself; "no" wins over "yes" at any time.
        """
        self._requeue = self._requeue and requeue
        self._reason = self._reason or reason

    def ask_save(self) -> None:
        """Ask for a save at the next step boundary, without a stop."""
        self._save_wanted = True

    def set_limit(self, name: str, limit: Limit | None) -> None:
        """Put a limit, by a name that a later one replaces; None takes it away. Safe from any thread."""
        rest = {key: value for key, value in self._limits.items() if key != name}
        self._limits = rest if limit is None else {**rest, name: limit}

    def set_grace(self, grace_s: float | None) -> None:
        """Say how long after SIGTERM the kill comes, in seconds; None when that is not known."""
        self._grace_s = grace_s

    def set_needs(self, *, step_s: float | None = None, save_s: float | None = None) -> None:
        """Say how long a step and a save were measured to take, in seconds; what is not given stays as it was."""
        self._needs = Needs(
            step_s=self._needs.step_s if step_s is None else step_s,
            save_s=self._needs.save_s if save_s is None else save_s,
        )

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked child: the parent decides
            return
        now = time.monotonic()
        if self._signals_begun is None:
            self._signals_begun, self.signal = now, signal.Signals(number).name
            self.ask(self.signal)
        elif now - self._signals_begun > ONE_BURST_S:
            if self._hurry and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._hurry = True
            self._signals_begun = now
        if number == signal.SIGTERM and self._terminated_at is None:
            self._terminated_at = now
