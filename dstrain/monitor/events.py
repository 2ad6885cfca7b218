"""events.jsonl: what happened in a run, one JSON object a line. The source of truth for tools; other outputs are views.

Rank 0 appends; one event is one `os.write` on an O_APPEND handle, so a crash can tear the last line only. Logging is
best effort: a full disk or a deleted folder drops events, counts them, warns once, and never stops a training step.
Every event has `event` (its name) and `time` (Unix seconds). Numbers that are not finite are written as the strings
"nan", "inf" and "-inf", because JSON has no such numbers. Secrets in texts are replaced (`base.secrets`), and the file is
its owner's only.
"""

from __future__ import annotations

import json
import math
import os
import stat
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dstrain.base.errors import DataError
from dstrain.base.logs import get_logger
from dstrain.base.secrets import redact
from dstrain.base.world import World

_log = get_logger(__name__)

_LINE_LIMIT = 1 << 20

CURVE_EVENTS = frozenset({"step", "step_skipped", "evaluated", "ranks"})
"""Events that are points of a curve over `step`, which a resume from an earlier step takes back."""


class EventLog:
    """Appends events to one file; silent on every rank but the first."""

    def __init__(self, path: Path, world: World) -> None:
        self.path = path
        self.dropped = 0
        """Events lost because the file could not be written."""
        self._active = world.is_first
        self._handle: int | None = None
        self._identity = (0, 0)
        """Device and inode behind the handle: a number that someone else closed may be anybody's file by now."""
        self._line_is_open = False
        self._warned = False

    def write(self, event: str, **fields: Any) -> None:
        """Append one event. Never raises, whatever the disk does and whatever the fields are.

        Args:
            event: its name, e.g. "step".
            fields: JSON-able values; `event` and `time` are set here.
        """
        if not self._active:
            return
        try:
            self._append(_line({"event": event, "time": round(time.time(), 3), **fields}))
        except Exception as error:  # noqa: BLE001  (best effort: nothing that can be logged may stop a training step)
            self._drop(error)

    def close(self) -> None:
        """Close the file; writing again opens it again."""
        handle, self._handle = self._handle, None
        if handle is not None and self._is_ours(handle):
            try:
                os.close(handle)
            except OSError as error:
                self._drop(error)

    def _append(self, line: bytes) -> None:
        if self._handle is None or not self._is_in_place(self._handle):
            self._handle = self._open()
        data = b"\n" + line if self._line_is_open else line
        written = os.write(self._handle, data)
        self._line_is_open = written < len(data)
        if self._line_is_open:
            raise OSError(f"short write: {written} of {len(data)} bytes")

    def _is_in_place(self, handle: int) -> bool:
        """Whether the handle is still the file at `path`: someone may have closed, deleted or moved it under us."""
        try:
            return self._is_ours(handle) and _identity(os.stat(self.path)) == self._identity
        except OSError:
            return False

    def _is_ours(self, handle: int) -> bool:
        try:
            return _identity(os.fstat(handle)) == self._identity
        except OSError:
            return False

    def _open(self) -> int:
        self.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Not waiting: the file may have become a pipe that nobody reads.
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        handle = os.open(self.path, flags, 0o600)
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise OSError("not an ordinary file")
            # A killed run may have left half a line; the next event must not become part of it.
            self._line_is_open = found.st_size > 0 and os.pread(handle, 1, found.st_size - 1) != b"\n"
        except OSError:
            os.close(handle)
            raise
        self._identity = _identity(found)
        return handle

    def _drop(self, error: Exception) -> None:
        self.dropped += 1
        if not self._warned:
            self._warned = True
            _log.warning("%s: events are being lost (training goes on): %s", self.path, error)


def read_events(path: Path) -> list[dict[str, Any]]:
    """Read a run's events in the order they were written; lines torn by a crash are left out.

    Raises:
        DataError: the file is missing or cannot be read.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path}: events cannot be read: {error.strerror or error}") from None
    events: list[dict[str, Any]] = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    return events


def current_curve(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Leave out curve points that a later resume took back, so that each step stands once and curves do not overlap.

    A run that dies at step 57 and resumes from step 50 writes steps 51 to 57 twice; the second ones count. `resumed`
    with `step` k takes back points after k, `started` takes back all.
    """
    kept: list[dict[str, Any]] = []
    earliest: float = math.inf
    for event in reversed(events):
        step = event.get("step")
        if event.get("event") in CURVE_EVENTS and isinstance(step, int) and step > earliest:
            continue
        kept.append(dict(event))
        if event.get("event") in ("resumed", "rolled_back") and isinstance(step, int):
            earliest = min(earliest, step)
        elif event.get("event") == "started":
            earliest = -1
    kept.reverse()
    return kept


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _line(record: Mapping[str, Any]) -> bytes:
    """One event as a line of strict JSON."""
    text = json.dumps(_plain(record), default=lambda value: _text(str(value)), allow_nan=False)
    if len(text) > _LINE_LIMIT:
        raise ValueError(f"an event of {len(text):,} characters; a line may have {_LINE_LIMIT:,}")
    return text.encode() + b"\n"


def _text(text: str) -> str:
    if len(text) > _LINE_LIMIT:
        raise ValueError(f"a text of {len(text):,} characters; a line may have {_LINE_LIMIT:,}")
    return redact(text)


def _plain(value: Any) -> Any:
    """Make numpy and torch numbers plain, name nan and infinities, and replace secrets in texts, at any depth."""
    if isinstance(value, str):
        return _text(value)
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        return [_plain(item) for item in value]
    return value
