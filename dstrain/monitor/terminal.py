"""The run's pulse for people: one rewritten line on a terminal, a log line now and then elsewhere. Rank 0 only."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import sys
import time
from collections import deque
from datetime import timedelta
from typing import TextIO

from dstrain.base.logs import get_logger
from dstrain.base.protocols import StepReport
from dstrain.base.world import World

_log = get_logger(__name__)

_REDRAW_SECONDS = 0.2
_ETA_STEPS = 50
_CLEAR_LINE = "\r\x1b[K"


class TerminalLine:
    """Shows where the run stands.

    Args:
        world: this process's place.
        max_steps: optimizer steps of the whole run.
        stream: where the live line goes; standard error when None.
    """

    def __init__(self, world: World, *, max_steps: int, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._active = world.is_first
        self._live = self._active and self._stream.isatty()
        self._max_steps = max_steps
        self._step_seconds: deque[float] = deque(maxlen=_ETA_STEPS)
        self._drawn_at = 0.0
        self._filter = _ClearBeforeLog(self._stream)
        if self._live:
            for handler in logging.getLogger("dstrain").handlers:
                handler.addFilter(self._filter)

    def show(self, report: StepReport, *, tokens_per_second: float, padding_percent: float, is_logged: bool) -> None:
        """Take note of a step; draw or log it when it is time to.

        Args:
            report: the step just done.
            tokens_per_second: real tokens per second of all ranks.
            padding_percent: unused token slots, percent.
            is_logged: whether this step is a point of the curves; decides where there is no terminal.
        """
        if not self._active:
            return
        self._step_seconds.append(report.seconds.get("total", 0.0))
        due = is_logged
        if self._live:
            due = time.monotonic() - self._drawn_at > _REDRAW_SECONDS or report.step == self._max_steps
        if not due:
            return
        remaining = (self._max_steps - report.step) * sum(self._step_seconds) / len(self._step_seconds)
        line = progress_line(
            report,
            max_steps=self._max_steps,
            tokens_per_second=tokens_per_second,
            padding_percent=padding_percent,
            remaining_seconds=remaining,
        )
        if self._live:
            self._draw(line)
        else:
            _log.info("%s", line)

    def close(self) -> None:
        """Leave the last live line standing and stop drawing."""
        if self._live and self._drawn_at:
            self._write("\n")
        for handler in logging.getLogger("dstrain").handlers:
            handler.removeFilter(self._filter)
        self._live = False

    def _draw(self, line: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        self._write(_CLEAR_LINE + line[:width])
        self._drawn_at = time.monotonic()

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # the terminal went away; the run stays
            self._live = False


class _ClearBeforeLog(logging.Filter):
    """Wipes the live line before a log line is printed over it; lets every record pass."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    def filter(self, record: logging.LogRecord) -> bool:
        with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
            self._stream.write(_CLEAR_LINE)
        return True


def progress_line(
    report: StepReport, *, max_steps: int, tokens_per_second: float, padding_percent: float, remaining_seconds: float
) -> str:
    """One line of text saying where the run stands.

    Args:
        report: the step just done.
        max_steps: optimizer steps of the whole run.
        tokens_per_second: real tokens per second of all ranks.
        padding_percent: unused token slots, percent.
        remaining_seconds: estimated time to the last step.
    """
    parts = [
        f"step {report.step:,}/{max_steps:,}",
        f"loss {report.loss:.4f}",
        f"acc {100 * report.accuracy:.1f} %",
        f"lr {report.learning_rate:.2e}",
        f"{_short(tokens_per_second)} tok/s",
        f"pad {padding_percent:.1f} %",
        f"ETA {timedelta(seconds=round(remaining_seconds))}",
    ]
    if not report.applied:
        parts.insert(1, "SKIPPED: gradient not finite")
    return " | ".join(parts)


def _short(number: float) -> str:
    if not math.isfinite(number):
        return str(number)
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"
