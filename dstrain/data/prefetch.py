"""Background threads that make steps ahead of the training loop; order and content never depend on them.

Threads, not processes: reading, packing and masking are NumPy work that releases the GIL, nothing outlives a kill, and no
stop signal can reach a worker (docs/architecture.md). What is made ahead is bounded in steps and in bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import TracebackType

from dstrain.base.protocols import Interrupted, Loader, StepData

_JOIN_S = 30
_LOOK_S = 0.5


class Prefetcher:
    """Iterates `(step, data)` from `first_step` on, in order. Use as a context manager, so that the threads stop."""

    def __init__(
        self, loader: Loader, *, first_step: int, last_step: int, depth: int, threads: int = 1, limit_bytes: int = 1 << 62,
        should_leave: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        """Start making steps [first_step, last_step).

        Args:
            loader: the pure loader.
            first_step: the step to start at.
            last_step: one past the last step that will be asked for.
            depth: steps made or being made ahead of the one last handed out; 0 makes each when it is asked for.
            threads: how many make steps; more than `depth` are of no use.
            limit_bytes: no further step is begun while the finished ones hold more than this.
            should_leave: asked while a step is not there yet: whether to raise `Interrupted` instead of waiting on.
        """
        self._loader, self._next, self._last = loader, first_step, last_step
        self._depth, self._limit, self._should_leave = depth, limit_bytes, should_leave
        self._begun = first_step
        self._held = 0
        self._made: dict[int, StepData | BaseException] = {}
        self._failed: BaseException | None = None
        self._stopping = False
        self._changed = threading.Condition()
        count = min(threads, depth) if first_step < last_step else 0
        self._threads = [
            threading.Thread(target=self._work, name=f"dstrain-prefetch-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[tuple[int, StepData]]:
        while self._next < self._last:
            if self._failed is not None:  # nothing after a step that could not be made
                raise self._failed
            step = self._next
            item = self._take(step) if self._threads else self._make(step)
            if isinstance(item, BaseException):
                self._failed = item
                raise item
            yield step, item

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._stopping = True
            self._made.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=_JOIN_S)

    def _make(self, step: int) -> StepData | BaseException:
        try:
            self._next = step + 1
            return self._loader.step(step)
        except Exception as error:  # noqa: BLE001  (raised by the caller, and again for whoever asks once more)
            return error

    def _take(self, step: int) -> StepData | BaseException:
        with self._changed:
            while not self._changed.wait_for(lambda: step in self._made, timeout=_LOOK_S):
                if self._should_leave():
                    raise Interrupted(f"asked to stop while waiting for the data of step {step}")
            item = self._made.pop(step)
            self._next = step + 1
            if not isinstance(item, BaseException):
                self._held -= size_bytes(item)
            self._changed.notify_all()
        return item

    def _work(self) -> None:
        while (step := self._begin()) is not None:
            fault: BaseException | None = None
            try:
                data = self._loader.step(step)
                size = size_bytes(data)
            except BaseException as error:  # noqa: BLE001  (carried to the loop, which raises it in its own thread)
                fault = error
            with self._changed:
                self._made[step] = data if fault is None else fault
                self._held += size if fault is None else 0
                self._changed.notify_all()
            if fault is not None:
                return

    def _begin(self) -> int | None:
        """The next step to make, once there is room for it; None when there is nothing more to do."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopping or self._begun >= self._last or (self._has_room() and not self._has_fault())
            )
            if self._stopping or self._begun >= self._last:
                return None
            self._begun += 1
            return self._begun - 1

    def _has_room(self) -> bool:
        ahead = self._begun - self._next
        return ahead < self._depth and (self._held <= self._limit or ahead == 0)

    def _has_fault(self) -> bool:
        return any(isinstance(item, BaseException) for item in self._made.values())


def size_bytes(data: StepData) -> int:
    """Bytes of a step's tensors."""
    total = 0
    for batch in data.micro_batches:
        for tensor in (batch.tokens, batch.positions, batch.targets, batch.labels, batch.token_types):
            total += tensor.numel() * tensor.element_size() if tensor is not None else 0
    return total
