"""The one tree of faults that are the user's to mend, and the exit codes a scheduler can act on.

Everything a person can cause (a bad key, a missing file, a damaged shard, a second job on one run folder) raises a
`DstrainError` with one sentence that names the thing, the value and the fix. The command line prints that sentence and
leaves with the error's exit code; it never shows a traceback for it. A traceback means a defect in dstrain.

The codes follow sysexits' EX_TEMPFAIL (75) and up, clear of shell (126-165) and Python (1, 2) codes.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """What the process says to its launcher; `docs/exit-codes.md` is the same table for people."""

    COMPLETE = 0
    """The work is done, or was already done."""
    DEFECT = 1
    """An unexpected error: a defect in dstrain or a library. A traceback was printed."""
    USAGE = 2
    """The command line itself could not be parsed."""
    SAVED_REQUEUE = 75
    """Stopped on request (signal, time limit) after saving: start the same command again to go on."""
    RETRY_HERE = 76
    """A passing fault: the same nodes may try again."""
    UNHEALTHY_NODE = 77
    """This machine cannot do the work (no GPU where one is asked for, no compiler for a needed op): try another."""
    BAD_INPUT = 78
    """Configuration, data or checkpoint is wrong: starting again unchanged fails again."""
    NO_PROGRESS = 79
    """The run goes round in circles or its numbers are not finite: cancel the chain and look."""
    RUN_IN_USE = 80
    """Another live job owns the run folder."""
    NOTHING_TO_RESUME = 81
    """`train.resume: require` was set and there is no valid checkpoint."""
    SAVED_END = 82
    """Stopped for good (stop file, spent budget) after saving: it goes on only when a person wants it to."""


class DstrainError(Exception):
    """A fault whose cause and mend fit in one message. Subclasses choose the exit code."""

    exit_code = ExitCode.BAD_INPUT


class PeerError(DstrainError):
    """Another rank failed; this one leaves with the same exit code and lets the other speak."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = ExitCode(exit_code)


class PeerGoneError(DstrainError):
    """Another rank is gone, or did not come to a collective in time; why is not known here."""

    exit_code = ExitCode.RETRY_HERE


class ConfigError(DstrainError):
    """A configuration file, key, value or command-line override is wrong."""


class DataError(DstrainError):
    """A corpus, tokenizer, shard or task file is missing, damaged or does not fit."""


class DamagedBlockError(DataError):
    """A block's bytes are not those that were written; a damage policy may let the run go on without it."""

    def __init__(self, message: str, *, dataset: str = "", block: int = -1) -> None:
        super().__init__(message)
        self.dataset, self.block = dataset, block

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_damaged, (str(self), self.dataset, self.block)


def _rebuild_damaged(message: str, dataset: str, block: int) -> DamagedBlockError:
    return DamagedBlockError(message, dataset=dataset, block=block)


class CheckpointError(DstrainError):
    """A checkpoint is damaged, incomplete, or belongs to another model or dataset."""


class NothingToResumeError(CheckpointError):
    """A resume was required and no valid checkpoint exists."""

    exit_code = ExitCode.NOTHING_TO_RESUME


class RunInUseError(DstrainError):
    """Another live job holds the run folder's lease."""

    exit_code = ExitCode.RUN_IN_USE


class MachineError(DstrainError):
    """This machine lacks what the run needs."""

    exit_code = ExitCode.UNHEALTHY_NODE


class NoProgressError(DstrainError):
    """The run cannot get anywhere: steps are skipped one after another, or numbers are not finite."""

    exit_code = ExitCode.NO_PROGRESS


class StorageError(DstrainError):
    """Reading or writing failed in a way another try may not see (full disk, I/O error)."""

    exit_code = ExitCode.RETRY_HERE
