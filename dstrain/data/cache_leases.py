"""What the processes that share a cache need next: one lease file each, held by flock, so that it ends with the process.

Beside the lease lies its plan: `horizon_bytes`, the number of keys inside the horizon, then the keys, soonest first. The
lease of a dead process is recognised by its lock being free, and removed. Knows no entries.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_PUBLISHED_KEYS = 1 << 16
"""Others see this much of a plan; 64k blocks of 256 KB are 16 GB."""


@dataclass(frozen=True)
class LeasePlan:
    """What one process told of itself."""

    horizon_bytes: int
    horizon: tuple[str, ...]
    """Keys that must stay."""
    later: tuple[str, ...]
    """Keys that will be needed after those."""


class Lease:
    """This process's lease; taken under the cache's lock.

    Attributes:
        name: unique among all processes of the node.
    """

    def __init__(self, folder: Path, *, horizon_bytes: int) -> None:
        """Create and lock the lease file.

        Args:
            folder: the cache's leases.
            horizon_bytes: what this process fetches ahead.
        """
        self.name = f"{os.getpid()}_{uuid.uuid4().hex[:12]}"
        self._path = folder / f"{self.name}.lease"
        self._plan_path = folder / f"{self.name}.plan"
        self._order: dict[str, int] = {}
        self._horizon = 0
        self._lock = threading.Lock()
        self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        fcntl.flock(self._handle, fcntl.LOCK_EX)
        self.publish({}, horizon_bytes=horizon_bytes)

    def publish(self, keys: Mapping[str, int], *, horizon_bytes: int) -> None:
        """Replace the plan; keys map to sizes, soonest first."""
        count, total = 0, 0
        for size in keys.values():
            total += size
            if total > horizon_bytes:
                break
            count += 1
        with self._lock:
            self._order = {key: place for place, key in enumerate(keys)}
            self._horizon = count
        lines = [f"{horizon_bytes} {count}", *list(keys)[:MAX_PUBLISHED_KEYS]]
        temporary = self._plan_path.with_suffix(".new")
        temporary.write_text("\n".join(lines) + "\n")
        os.replace(temporary, self._plan_path)

    def forget(self, keys: Sequence[str]) -> None:
        """These were read: this process needs them no more."""
        with self._lock:
            for key in keys:
                self._order.pop(key, None)

    def now(self) -> tuple[set[str], dict[str, int]]:
        """Keys inside the horizon, and the place in the plan of every key."""
        with self._lock:
            return {key for key, place in self._order.items() if place < self._horizon}, dict(self._order)

    def release(self) -> None:
        """Remove the lease."""
        if self._handle >= 0:
            for path in (self._plan_path, self._path):
                path.unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = -1


def live_leases(folder: Path) -> Iterator[tuple[str, LeasePlan]]:
    """Name and plan of every live process's lease; removes those of dead ones. Call under the cache's lock."""
    for path in sorted(folder.glob("*.lease")):
        try:
            handle = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield path.stem, _read_plan(path.with_suffix(".plan"))
        else:
            for left in (path.with_suffix(".plan"), path.with_suffix(".new"), path):
                left.unlink(missing_ok=True)
        finally:
            os.close(handle)


def protected_and_next_use(folder: Path, *, own: Lease) -> tuple[set[str], dict[str, int]]:
    """Keys that no eviction may touch, and how soon each planned key is needed by anybody."""
    protected, next_use = own.now()
    for name, plan in live_leases(folder):
        if name != own.name:
            protected.update(plan.horizon)
            for place, key in enumerate((*plan.horizon, *plan.later)):
                next_use[key] = min(place, next_use.get(key, place))
    return protected, next_use


def _read_plan(path: Path) -> LeasePlan:
    with contextlib.suppress(OSError, ValueError):
        first, *keys = path.read_text().splitlines()
        horizon_bytes, count = (int(word) for word in first.split())
        return LeasePlan(horizon_bytes, tuple(keys[:count]), tuple(keys[count:]))
    return LeasePlan(0, (), ())
