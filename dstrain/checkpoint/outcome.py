"""How a save ended: what `CheckpointWriter.poll` and `settle` return. Types without input or output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dstrain.base.errors import CheckpointError, DstrainError, ExitCode, RunInUseError


@dataclass(frozen=True)
class Published:
    """A checkpoint that is in its place."""

    step: int
    folder: Path
    size_bytes: int
    """Of all its files."""
    verified: bool
    """Whether every file was read back and hashed before it was published."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall seconds of rank 0: copy (training stood still), write (its own file, read back included), publish (waiting for the other ranks,
    small files, rename), total (from the copy's beginning to the rename)."""


@dataclass(frozen=True)
class SaveOutcome:
    """The end of one save, or on a rank above 0 the end of that rank's part in it."""

    step: int
    published: Published | None = None
    """What is in place now; None when the save failed, and where `own_part` is set."""
    error: str = ""
    """Why it failed, one sentence; empty otherwise."""
    exit_code: int = 0
    """ExitCode of the fault: RUN_IN_USE when another job owns the run, which must end this one. 0 when nothing failed."""
    own_part: bool = False
    """From `poll` on a rank above 0: speaks of this rank's file only."""
    first_seen: bool = True
    """False where `poll` has shown this rank the same end before, so that it is not counted twice."""

    @property
    def failed(self) -> bool:
        """Whether something went wrong."""
        return bool(self.error)

    def fault(self) -> DstrainError:
        """The exception that a caller who cannot go on raises."""
        if self.exit_code == ExitCode.RUN_IN_USE:
            return RunInUseError(self.error)
        return CheckpointError(self.error)

    def to_plain(self) -> dict[str, Any]:
        """JSON-able, for the agreement between ranks."""
        plain = asdict(self)
        if self.published is not None:
            plain["published"] |= {"folder": str(self.published.folder), "seconds": dict(self.published.seconds)}
        return plain

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> SaveOutcome:
        """The inverse of `to_plain`."""
        found = plain["published"]
        published = None if found is None else Published(**{**found, "folder": Path(found["folder"])})
        return cls(**{**plain, "published": published})
