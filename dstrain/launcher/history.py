"""`supervisor.json`: every attempt of a run, for tools and for the save interval; written whole after each change.

Knows nothing of processes. A damaged file is said and begun anew: a run is not held up by its own diary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dstrain.base.config import Config
from dstrain.base.errors import DataError
from dstrain.base.secrets import redacted
from dstrain.base.storage import read_json, write_json

FILE_NAME = "supervisor.json"
FORMAT = 1
TRAINING = ("pretrain", "finetune")
_NOT_FAILURES = (0, 2, 75, 78, 80, 81, 82)
"""Ends that say nothing about how often machines fail: done, asked, or the user's to mend."""


class AttemptRecord(Config):
    """One start of the launcher."""

    number: int
    """From 1, over all supervisors of the run."""
    stage: str
    """pretrain, finetune or evaluate."""
    mark: str
    """The mark in the environment of its processes."""
    argv: tuple[str, ...]
    """What was started."""
    processes: int
    """Ranks."""
    hosts: tuple[str, ...]
    """Where; empty for this machine."""
    log: str
    """Output of the launcher and the ranks, relative to the run folder."""
    started: float
    """Unix seconds."""
    checkpoint_before: int
    """Step of the newest checkpoint at the start; -1 for none."""
    reached_before: int
    """Highest step reached before; -1 for none."""
    ended: float | None = None
    """Unix seconds; None while it runs."""
    code: int | None = None
    """Exit code of the attempt as a whole; None while it runs, and where ranks ended without a word."""
    cause: str = ""
    """Why it ended."""
    ranks_at_fault: tuple[int, ...] = ()
    """Ranks the cause is about."""
    hosts_at_fault: tuple[str, ...] = ()
    """Their hosts, as far as known."""
    checkpoint_after: int = -1
    """Step of the newest checkpoint at the end."""
    reached_after: int = -1
    """Highest step reached."""
    decision: str = ""
    """What followed."""


class _File(Config):
    format: int
    attempts: tuple[AttemptRecord, ...]


@dataclass(frozen=True)
class FailureStatistics:
    """How often a run was interrupted by faults."""

    failures: int
    hours: float
    """Supervised hours in which they happened."""

    @property
    def mean_hours_between(self) -> float | None:
        """Mean time between failures in hours; None before the first."""
        return self.hours / self.failures if self.failures else None


class History:
    """The attempts of a run folder."""

    def __init__(self, run_folder: Path, *, say: Callable[[str], None]) -> None:
        """Read what is there; an attempt whose supervisor died without closing it is closed by its log's last change."""
        self._path = run_folder / FILE_NAME
        try:
            self.attempts = list(read_history(run_folder))
        except DataError as error:
            say(f"the history cannot be read and begins anew: {error}")
            self.attempts = []
        for index, record in enumerate(self.attempts):
            if record.ended is None:
                ended = max(record.started, _changed(run_folder / record.log))
                self.attempts[index] = record.model_copy(update={"ended": ended, "cause": "the supervisor was killed"})

    @property
    def next_number(self) -> int:
        """Number of the attempt that comes."""
        return max((record.number for record in self.attempts), default=0) + 1

    def begin(self, record: AttemptRecord) -> None:
        """Write down an attempt that starts now.

        Raises:
            StorageError: the run folder cannot be written.
        """
        self.attempts.append(record)
        self._write()

    def close(self, **fields: Any) -> AttemptRecord:
        """Complete the last record with what is known at its end.

        Raises:
            StorageError: the run folder cannot be written.
        """
        self.attempts[-1] = self.attempts[-1].model_copy(update={"ended": time.time(), **fields})
        self._write()
        return self.attempts[-1]

    def _write(self) -> None:
        write_json(self._path, redacted(_File(format=FORMAT, attempts=tuple(self.attempts)).model_dump(mode="json")))


def read_history(run_folder: Path) -> tuple[AttemptRecord, ...]:
    """All attempts, oldest first; none when the run was never supervised.

    Raises:
        DataError: the file is damaged or of another format.
    """
    path = run_folder / FILE_NAME
    if not path.exists():
        return ()
    data = read_json(path)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise DataError(f"{path}: not a supervisor history of format {FORMAT}")
    try:
        # Lists stand for tuples in JSON; everything else stays strict.
        return _File.model_validate(data, strict=False).attempts
    except ValidationError as error:
        raise DataError(f"{path}: {error.errors()[0]['msg']} at {error.errors()[0]['loc']}") from None


def failure_statistics(run_folder: Path) -> FailureStatistics:
    """Failures and hours of a run's training attempts, for the interval between saves.

    Raises:
        DataError: the history is damaged.
    """
    done = [record for record in read_history(run_folder) if record.stage in TRAINING and record.ended is not None]
    return FailureStatistics(
        failures=sum(record.code not in _NOT_FAILURES for record in done),
        hours=sum(max(0.0, (record.ended or 0.0) - record.started) for record in done) / 3600,
    )


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
