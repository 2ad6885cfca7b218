"""Carries a stop request to ranks that wait, past the training's own agreement, which a waiting rank does not reach.

The ranks agree on a stop in the next step. That is not enough when the rank that got the signal stands in a collective,
where Python runs no handler until the others come, and the others wait for data, unasked. So the kernel's note of a signal
(a wake-up pipe) is read by a thread, which leaves a word in the job's key-value store, and a rank that waits looks there, a
few times a second. A rank that does not wait never looks. Without a store (one rank) only the own request counts.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import TracebackType
from typing import Protocol

from dstrain.base.logs import get_logger
from dstrain.health.signals import STOP_SIGNALS, StopRequest

KEY = "dstrain/stop"
LOOK_EVERY_S = 0.5
_LOG = get_logger(__name__)


class Store(Protocol):
    """What is used of torch.distributed's store; both may raise RuntimeError when its host has gone."""

    def set(self, key: str, value: str, /) -> None:
        """Keep a value."""
        ...

    def check(self, keys: list[str], /) -> bool:
        """Whether all keys are there, without waiting."""
        ...


class StopRelay:
    """One rank's end; a context manager, entered by the main thread after the stop request's handlers are in place."""

    def __init__(self, stop: StopRequest, store: Store | None, *, look_every_s: float = LOOK_EVERY_S) -> None:
        """Nothing happens yet.

        Args:
            stop: this rank's request.
            store: shared by all ranks of the job, and of no other start of it.
            look_every_s: shortest pause between two questions to the store, however many threads wait.
        """
        self._stop, self._store, self._look_every_s = stop, store, look_every_s
        self._next_look = 0.0
        self._told = threading.Event()
        self._read, self._write = -1, -1
        self._previous = -1
        self._thread = threading.Thread(target=self._listen, name="dstrain-stop-relay", daemon=True)

    def should_leave(self) -> bool:
        """Whether this rank, which waits for something, should stop waiting: it or another was asked to stop."""
        if self._stop.reason is None and self._is_told():
            self._stop.ask("asked on another rank")
        if self._stop.reason is None:
            return False
        self.tell()
        return True

    def tell(self) -> None:
        """Let the ranks that wait know; at most once."""
        if self._store is None or self._told.is_set():
            return
        self._told.set()
        try:
            self._store.set(KEY, "stop")
        except RuntimeError as error:
            _LOG.warning("a stop request could not be passed to ranks that wait: %s", error)

    def __enter__(self) -> StopRelay:
        if self._store is not None:
            self._read, self._write = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(self._write, False)
            self._previous = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._store is not None:
            signal.set_wakeup_fd(self._previous)
            os.close(self._write)  # ends the thread, which reads to the end
            self._thread.join()
            os.close(self._read)

    def _listen(self) -> None:
        numbers = {int(number) for number in STOP_SIGNALS}
        while data := os.read(self._read, 64):
            if numbers & set(data):
                self.tell()

    def _is_told(self) -> bool:
        now = time.monotonic()
        if now < self._next_look:
            return False
        self._next_look = now + self._look_every_s
        try:
            return self._store is not None and self._store.check([KEY])
        except RuntimeError:  # its host has left: what that means, the next collective says
            return False
