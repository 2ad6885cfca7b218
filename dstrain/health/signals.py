"""Stop requests: signals only set a flag here; the loop lets all ranks agree on it and stops at one step boundary.

SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 ask for "save and leave"; a second SIGINT within the same stop raises KeyboardInterrupt,
for a person who has had enough. SIGCONT, which SLURM sends first, is ignored. A rank whose launcher has died asks for the
same stop, because DeepSpeed's launcher leaves its ranks as orphans when it is killed.
"""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Collects the reasons to stop; use as a context manager around a run, so that old handlers come back."""

    def __init__(self, *, watch_parent: bool) -> None:
        """Start with no reason.

        Args:
            watch_parent: treat the death of the parent process (a launcher) as a stop request.
        """
        self._reason: str | None = None
        self._interrupts = 0
        self._parent = os.getppid() if watch_parent else None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def reason(self) -> str | None:
        """Why this rank should stop, or None."""
        if self._reason is None and self._parent is not None and os.getppid() != self._parent:
            self._reason = "the launcher is gone"
        return self._reason

    def ask(self, reason: str) -> None:
        """Ask for a stop from inside the program."""
        self._reason = self._reason or reason

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
        self.ask(signal.Signals(number).name)
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
