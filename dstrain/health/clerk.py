"""A second thread that does what may take for ever (files on shared storage), so that the first one need not wait.

One job at a time, asked for with a time limit. A storage fault of a job is swallowed: who watches must go on watching.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from dstrain.base.errors import StorageError


class Clerk:
    """Does one job at a time on a daemon thread of its own."""

    def __init__(self) -> None:
        self._idle = threading.Event()
        self._idle.set()
        self._result: Any = None

    @property
    def is_busy(self) -> bool:
        """Whether the last job is still being done."""
        return not self._idle.is_set()

    def start(self, job: Callable[[], Any]) -> None:
        """Begin a job; the clerk must not be busy."""
        assert not self.is_busy
        self._idle.clear()
        self._result = None
        threading.Thread(target=self._work, args=(job,), name="dstrain-clerk", daemon=True).start()

    def take(self) -> Any:
        """The result of the last job, once; None when there is none or it failed."""
        result, self._result = self._result, None
        return result

    def do(self, job: Callable[[], Any], *, seconds: float) -> Any:
        """Do a job and wait for it.

        Args:
            job: what to do.
            seconds: longest wait, for the job before this one, too.

        Returns:
            Its result; None when it failed or takes longer.
        """
        if not self._idle.wait(seconds):
            return None
        self.start(job)
        return self.take() if self._idle.wait(seconds) else None

    def _work(self, job: Callable[[], Any]) -> None:
        try:
            self._result = job()
        except StorageError:
            self._result = None
        finally:
            self._idle.set()
