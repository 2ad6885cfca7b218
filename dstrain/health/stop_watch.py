"""Rank 0's slow questions, in a thread: the stop and save files, and the SLURM controller. What it hears, it tells the
stop request; the training never waits for it.

A controller that does not answer leaves the last known end in force; SLURM_JOB_END_TIME stands in until it first does.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from dstrain.base.logs import get_logger
from dstrain.health.signals import StopRequest
from dstrain.health.stop_config import StopConfig, budget_limits
from dstrain.health.stop_deadline import Limit
from dstrain.health.stop_files import stop_file_reason, take_save_file
from dstrain.health.stop_slurm import ask_time_left, end_from_environment, job_id

_LOG = get_logger(__name__)
_FIRST_RETRY_S = 10.0


class StopWatch:
    """Watches while its block runs; to be used by rank 0 only, the others learn from it in the loop's agreement."""

    def __init__(
        self,
        stop: StopRequest,
        config: StopConfig,
        run_folder: Path,
        *,
        num_devices: int,
        started: float,
        earlier_device_s: float = 0.0,
        tell: Callable[[], None] | None = None,
    ) -> None:
        """Set the limits that need no question; looks at nothing yet.

        Args:
            stop: is told.
            config: what to watch.
            run_folder: where the files are looked for.
            num_devices: ranks of this job.
            started: `time.monotonic()` when this job began.
            earlier_device_s: device-seconds that earlier jobs of this run have used.
            tell: called when there is a reason to stop, for ranks that wait and do not come to the loop's agreement.
        """
        self._stop, self._config, self._folder, self._tell = stop, config, run_folder, tell
        self._job = job_id() if config.slurm_end else None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="dstrain-stop-watch", daemon=True)
        self._next_question = -math.inf
        self._answered = False
        stop.set_grace(config.grace_s)
        limits = budget_limits(config, started=started, num_devices=num_devices, earlier_device_s=earlier_device_s)
        for name, limit in limits.items():
            stop.set_limit(name, limit)
        if self._job is not None:
            self._set_end(end_from_environment(now=time.time()))

    def look(self) -> None:
        """Ask everything that is due, once; blocks while the controller thinks."""
        reason = stop_file_reason(self._folder)
        if reason is not None:
            self._stop.ask(reason, requeue=False)
        if take_save_file(self._folder):
            self._stop.ask_save()
        if self._job is not None and time.monotonic() >= self._next_question:
            left = ask_time_left(self._job)
            self._set_end(left)
            self._answered = self._answered or left is not None
            pause = self._config.ask_every_s if self._answered else min(_FIRST_RETRY_S, self._config.ask_every_s)
            self._next_question = time.monotonic() + pause
        if self._tell is not None and self._stop.reason is not None:
            self._tell()

    def __enter__(self) -> StopWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()  # the thread is not waited for: it may be waiting for the controller

    def _watch(self) -> None:
        while not self._over.is_set():
            try:
                self.look()
            except Exception as error:  # noqa: BLE001  (a watch that ends must not end the training, nor be silent)
                _LOG.warning("looking for stop requests failed: %s", error)
            self._over.wait(self._config.look_every_s)

    def _set_end(self, left_s: float | None) -> None:
        if left_s is None:
            return
        if left_s == math.inf:
            self._stop.set_limit("slurm", None)
            return
        self._stop.set_limit(
            "slurm",
            Limit(
                time.monotonic() + left_s,
                "the end of the SLURM job is near",
                margin_s=self._config.margin_s,
                kills=True,
            ),
        )
