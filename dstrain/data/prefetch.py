"""A background thread that makes steps ahead of the training loop; order and content never depend on it.

Threads, not processes: reading, packing and masking are NumPy work that releases the GIL, nothing outlives a kill, and no
stop signal can reach a worker (docs/architecture.md).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from types import TracebackType

from dstrain.base.protocols import Loader, StepData

_POLL_S = 0.1


class Prefetcher:
    """Iterates `(step, data)` from `first_step` on, without end. Use as a context manager, so that the thread stops."""

    def __init__(self, loader: Loader, *, first_step: int, last_step: int, depth: int) -> None:
        """Start making steps [first_step, last_step).

        Args:
            loader: the pure loader.
            first_step: the step to start at.
            last_step: one past the last step that will be asked for.
            depth: steps made ahead; 0 makes each when it is asked for.
        """
        self._loader, self._next, self._last = loader, first_step, last_step
        self._queue: queue.Queue[tuple[int, StepData] | BaseException] | None = None
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        if depth > 0 and first_step < last_step:
            self._queue = queue.Queue(maxsize=depth)
            self._thread = threading.Thread(
                target=self._fill, args=(self._queue,), name="dstrain-prefetch", daemon=True
            )
            self._thread.start()

    def __iter__(self) -> Iterator[tuple[int, StepData]]:
        while self._next < self._last:
            if self._failure is not None:  # the thread has ended: nothing more would ever come
                raise self._failure
            if self._queue is None:
                item: tuple[int, StepData] | BaseException = (self._next, self._loader.step(self._next))
            else:
                item = self._queue.get()
            if isinstance(item, BaseException):
                self._failure = item
                raise item
            self._next += 1
            yield item

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=30)

    def _fill(self, target: queue.Queue[tuple[int, StepData] | BaseException]) -> None:
        step = self._next
        try:
            while step < self._last and not self._stopping.is_set():
                self._put(target, (step, self._loader.step(step)))
                step += 1
        except BaseException as error:  # noqa: BLE001  (carried to the loop, which raises it in its own thread)
            self._put(target, error)

    def _put(
        self, target: queue.Queue[tuple[int, StepData] | BaseException], item: tuple[int, StepData] | BaseException
    ) -> None:
        while not self._stopping.is_set():
            try:
                target.put(item, timeout=_POLL_S)
                return
            except queue.Full:
                continue
