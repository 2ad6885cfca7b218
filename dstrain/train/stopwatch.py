"""Adds up the time that pieces of a step take on the device, without making the step wait for it.

On a GPU a forward returns before it has run, so the time is taken by events on the device's own stream and read at a moment when
the step has waited for the device anyway.
"""

from __future__ import annotations

import time
from types import TracebackType

import torch


class Stopwatch:
    """A context manager entered once for each piece; `seconds` is their sum."""

    def __init__(self, device: str) -> None:
        """Start at zero.

        Args:
            device: cpu or cuda.
        """
        self._on_gpu = device == "cuda"
        self._total = 0.0
        self._started = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> Stopwatch:
        if self._on_gpu:
            self._events.append((_event(), _event()))
            self._events[-1][0].record()
        else:
            self._started = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._on_gpu:
            self._events[-1][1].record()
        else:
            self._total += time.perf_counter() - self._started

    def seconds(self) -> float:
        """The sum; on a GPU only after the device has been waited for."""
        on_gpu: float = sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
        return self._total + on_gpu


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
