"""Pass a growing log file through to a stream, from a thread.

The ranks write to the file, not to a pipe of the supervisor: with its reader dead, a pipe would kill the ranks that write
to it while they save. A stream that is closed ends the passing through, not the run.
"""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

_POLL_S = 0.1
_CHUNK_BYTES = 1 << 16


class LogFollower:
    """Copies what is appended to a file until it is closed; a context manager."""

    def __init__(self, log: Path, out: BinaryIO) -> None:
        """Name the file, which must exist, and the stream; copying begins at the file's present end."""
        self._file = open(log, "rb")
        self._file.seek(0, 2)
        self._out = out
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="dstrain-output", daemon=True)

    def __enter__(self) -> LogFollower:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=5)  # a terminal that is held (Ctrl-S) does not hold the job
        if not self._thread.is_alive():
            self._file.close()

    def _follow(self) -> None:
        try:
            while not self._stop.wait(_POLL_S):
                self._copy()
            self._copy()
        except (OSError, ValueError):
            return

    def _copy(self) -> None:
        while chunk := self._file.read(_CHUNK_BYTES):
            self._out.write(chunk)
            self._out.flush()
